"""Dense and slim models against another engine's dense one, in turn, at the same precision.

`atp-edge bench --peers onnxruntime-genai --json FILE` writes it for every precision
(bench/results/peers-cpu.json).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import onnx
from atp_export.export import export_onnx

from atp_bench.engines import GENAI
from atp_bench.engines.first_token import bench_first_token
from atp_bench.engines.genai import build, check_precision
from atp_bench.engines.latency import BenchReport, bench_onnx
from atp_bench.peers.targets import targets_of
from atp_bench.peers.untrained_cut import cut
from atp_edge.config import WidthsPolicy

PEERS = (GENAI,)
PEER_DENSE = f"{GENAI} dense"
FIRST_TOKEN_PROMPT = 512
# A round of it is one prefill a model, where a round of decoding is a hundred tokens.
_FIRST_TOKEN_ROUNDS = 4
# Read a row at a time, not whole: they are no part of what a token moves.
_BY_ROWS = ("Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding", "Reshape")


@dataclass(frozen=True, kw_only=True)
class Models:
    """Checkpoints to compare: the dense one, and slim ones by name; and what to say of them."""

    dense: Path
    slims: Mapping[str, Path]
    note: str


def demo_models(dense: Path, folder: Path, share: float, say: Callable[[str], None]) -> Models:
    """The dense model, and two cuts of it (uniform and per-layer widths) without any training."""
    slims, kept = {}, {}
    for policy in get_args(WidthsPolicy):
        say(f"cutting a slim model of {policy} widths")
        slims[f"slim {policy}"] = folder / f"slim-{policy}"
        kept[policy] = cut(dense, slims[f"slim {policy}"], share, policy)
    shares = ", ".join(f"{value:.1%} ({policy})" for policy, value in kept.items())
    return Models(
        dense=dense,
        slims=slims,
        note=f"slim models keep {shares} of the decoder's parameters; they are cut without "
        "training: latency and memory follow from widths, not from what the weights say",
    )


def compare(
    models: Models,
    precision: str,
    *,
    peers: Sequence[str],
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    rounds: int,
    threads: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Everything the comparison at one precision shows, as JSON.

    `pairs` are ratios "a : b" (above 1: b is faster, smaller), `bounds` what the bytes of weights
    and cache that a step moves allow at most, `first_token` a prompt of 512 tokens on our runtime,
    `asked` the targets, which are of one row. Raises ValueError for peers that are not known here
    or not installed.
    """
    check_peers(peers, [precision])
    slims = [("dense", slim) for slim in models.slims]
    with tempfile.TemporaryDirectory() as temporary:
        exported = _exported(models, precision, Path(temporary), say)
        theirs = _built(models.dense, precision, peers, Path(temporary), say)
        say(f"{precision}: measuring {prompt_tokens} + {new_tokens} tokens, in turn")
        report = bench_onnx(
            theirs | exported,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            rounds=rounds,
            threads=threads,
            engines=dict.fromkeys(theirs, GENAI),
            pairs=[*slims, *product(theirs, exported)],
        )
        say(f"{precision}: measuring the first token of {FIRST_TOKEN_PROMPT}")
        longer = {"prompt_tokens": FIRST_TOKEN_PROMPT, "rounds": _FIRST_TOKEN_ROUNDS * rounds}
        first = bench_first_token(exported, slims, threads=threads, **longer)
        held = batch * (prompt_tokens + new_tokens // 2)
        moved = {name: bytes_per_step(folder, held) for name, folder in exported.items()}
    found = {
        **report.to_dict(),
        "moved_bytes_per_step": moved,
        "bounds": _bounds(report, moved, models, list(theirs)),
        "first_token": asdict(first),
        "note": models.note,
    }
    targets = [t for peer in theirs if batch == 1 for t in targets_of(precision, found, peer)]
    return {**found, "asked": [asdict(target) for target in targets]}


def check_peers(peers: Sequence[str], precisions: Sequence[str]) -> None:
    """Raises ValueError for peers that are not known here, or what they cannot write."""
    unknown = [peer for peer in peers if peer not in PEERS]
    if unknown:
        raise ValueError(f"--peers {unknown[0]!r} is not known; expected {', '.join(PEERS)}")
    for precision in precisions:
        check_precision(precision)


def _exported(
    models: Models, precision: str, folder: Path, say: Callable[[str], None]
) -> dict[str, Path]:
    """Our ONNX of every model, by name."""
    written = {}
    for name, checkpoint in {"dense": models.dense, **models.slims}.items():
        say(f"{precision}: writing {name} as ONNX")
        written[name] = folder / name.replace(" ", "-")
        export_onnx(checkpoint, written[name], precision=precision)  # type: ignore[arg-type]
    return written


def _built(
    dense: Path, precision: str, peers: Sequence[str], folder: Path, say: Callable[[str], None]
) -> dict[str, Path]:
    """The dense model as the peers write it, by name."""
    if GENAI not in peers:
        return {}
    say(f"{precision}: {GENAI}'s builder writes the dense model")
    return {PEER_DENSE: build(dense, folder / "genai", precision)}


def _bounds(
    report: BenchReport, moved: Mapping[str, int], models: Models, peers: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Per pair, how much faster decoding could be were it bound by bytes alone, and the share of
    that bound that was reached. Another engine's dense model moves what our dense one does."""
    bounds = {}
    for slim in models.slims:
        bound = moved["dense"] / moved[slim]
        for reference in ("dense", *peers):
            reached = report.pairs[f"{reference} : {slim}"]["token_ms_p50"]
            assert isinstance(reached, float)
            bounds[f"{reference} : {slim}"] = {"bound": bound, "share": reached / bound}
    return bounds


def bytes_per_step(folder: Path, tokens: int) -> int:
    """Bytes of weights and of a cache of `tokens` tokens, all rows together, that a step reads."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    whole = {name for node in graph.node if node.op_type not in _BY_ROWS for name in node.input}
    weights = sum(_size(t) for t in graph.initializer if t.name in whole)
    cache = 0
    for value in graph.input:
        if value.name.startswith("past_key_values."):
            kind, dims = value.type.tensor_type.elem_type, value.type.tensor_type.shape.dim
            item = onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
            cache += dims[1].dim_value * dims[3].dim_value * item * tokens
    return weights + cache


def _size(tensor: onnx.TensorProto) -> int:
    external = {entry.key: entry.value for entry in tensor.external_data}
    return int(external["length"]) if external else len(tensor.raw_data)
