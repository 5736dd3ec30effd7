"""The targets of an exported model against another engine, beside what it reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Ratios: the reference's time or bytes over ours. The slim ones are of a model that lost 40 % of
# its decoder.
DENSE_DECODE = 1.0
SLIM_DECODE_FP32 = 1.35
MEMORY = 1.0
FIRST_TOKEN = 1.4


@dataclass(frozen=True, kw_only=True)
class Target:
    """A ratio to reach: met at `asked` or above (memory: above). Its fields are the file's keys."""

    precision: str
    what: str
    asked: float
    measured: float
    met: bool
    note: str = ""


def targets_of(precision: str, found: Mapping[str, Any], peer: str) -> Iterator[Target]:
    """Of one precision's comparison (`compare`) with `peer`, a row of it.

    Decoding: ours dense everywhere, slim in fp32, where bytes bound it. Memory: every model of
    ours. First token: every slim model against our dense one.
    """
    ours = [name for name in found["rows"] if name != peer]
    yield _decode(precision, found, f"{peer} : dense", DENSE_DECODE)
    for name in ours:
        if name != "dense" and precision == "fp32":
            yield _decode(precision, found, f"{peer} : {name}", SLIM_DECODE_FP32)
    for name in ours:
        measured = found["pairs"][f"{peer} : {name}"]["peak_memory_bytes"]
        yield Target(
            precision=precision,
            what=f"{name} against {peer}, peak memory",
            asked=MEMORY,
            measured=measured,
            met=measured > MEMORY,
        )
    prompt = found["first_token"]["prompt_tokens"]
    for pair, ratio in found["first_token"]["pairs"].items():
        reference, name = pair.split(" : ")
        low, high = ratio["quartiles"]
        yield Target(
            precision=precision,
            what=f"{name} against {reference}, first token of {prompt}",
            asked=FIRST_TOKEN,
            measured=ratio["median"],
            met=ratio["median"] >= FIRST_TOKEN,
            note=f"quartiles {low:.2f} to {high:.2f}",
        )


def _decode(precision: str, found: Mapping[str, Any], pair: str, target: float) -> Target:
    reference, name = pair.split(" : ")
    measured = found["pairs"][pair]["token_ms_p50"]
    bound = found["bounds"].get(pair)
    return Target(
        precision=precision,
        what=f"{name} against {reference}, decode",
        asked=target,
        measured=measured,
        met=measured >= target,
        note=f"{bound['share']:.0%} of the {bound['bound']:.2f}x bound by bytes" if bound else "",
    )
