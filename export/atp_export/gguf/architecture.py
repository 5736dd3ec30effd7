"""What llama.cpp calls a decoder, and where it has no place for one.

A family whose layers are Llama's goes under `llama`, whatever its name: fused matrices are taken
apart, and the RoPE that transformers computes is written as factors of frequencies (see rope.py).
Widths that differ by layer go under `deci` (Llama-Nemotron): Llama's layers with head counts and
MLP widths as arrays (llama.cpp, src/models/deci.cpp). Other families have an architecture of their
own, which reads one width for all layers. Tried with node-llama-cpp 3.22.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from atp_edge.model.families import Layout, ModelShape, Projection, Scales, rope_settings

LLAMA, PER_LAYER = "llama", "deci"
QKV: frozenset[Projection] = frozenset(("q_proj", "k_proj", "v_proj"))
ALL = frozenset[Projection](
    (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")
)
LINEAR = ("default", "linear")
FIXED = ("default", "linear", "llama3", "yarn", "longrope")
"""RoPE whose angles are those of a table, within the length it was first trained on."""


def _no_fault(shape: ModelShape) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What llama.cpp reads of one, and what it does not.

    paired: its RoPE turns neighbouring values (0, 1), (2, 3), ...; the others turn halves of a
    head against each other, as transformers does. square: as many heads as the hidden size has.
    head: `tied` reads none of its own, `own` wants one. biased: projections whose biases it adds.
    ropes: rope_types it computes; factors: RoPE's angles may be any, by a tensor (rope.py).
    windows: reads sliding windows. fault: what else is wrong.
    """

    name: str
    paired: bool = False
    square: bool = False
    head: str = "either"
    biased: frozenset[Projection] = frozenset()
    ropes: tuple[str, ...] = LINEAR
    factors: bool = False
    windows: bool = False
    fault: Callable[[ModelShape], str | None] = _no_fault


def _every_fourth_is_plain(shape: ModelShape) -> str | None:
    turned = [x.rope is not None for x in shape.layers]
    if turned != [(i + 1) % 4 != 0 for i in range(len(turned))]:
        return "RoPE that turns other layers than three of every four"
    return None


def _capped(shape: ModelShape) -> str | None:
    scales = shape.scales
    return None if scales.attention_cap and scales.logit_cap else "scores or logits without a cap"


def _uncapped(shape: ModelShape) -> str | None:
    return "capped logits" if shape.scales.logit_cap else None


def _hybrid_of_64(shape: ModelShape) -> str | None:
    slides = any(x.sliding_window for x in shape.layers)
    if slides != (len(shape.layers) == 64):
        return f"{len(shape.layers)} layers, {'some' if slides else 'none'} with a sliding window"
    return None


OWN: dict[str, Architecture] = {
    "qwen3": Architecture(name="qwen3", ropes=(*LINEAR, "yarn")),
    "gemma2": Architecture(name="gemma2", head="tied", windows=True, fault=_capped),
    "gemma3_text": Architecture(name="gemma3", windows=True, fault=_uncapped),
    "smollm3": Architecture(name="smollm3", paired=True, fault=_every_fourth_is_plain),
    "olmo2": Architecture(name="olmo2", square=True, head="own"),
    "olmo3": Architecture(
        name="olmo2", square=True, head="own", ropes=(*LINEAR, "yarn"), windows=True
    ),
    "granite": Architecture(name="granite", paired=True, biased=ALL, ropes=FIXED, factors=True),
    "exaone4": Architecture(
        name="exaone4",
        square=True,
        ropes=(*LINEAR, "llama3"),
        factors=True,
        windows=True,
        fault=_hybrid_of_64,
    ),
    "glm4": Architecture(name="glm4", paired=True, biased=QKV),
    "hunyuan_v1_dense": Architecture(name="hunyuan-dense"),
}
AS_LLAMA = Architecture(name=LLAMA, paired=True, biased=ALL, ropes=FIXED, factors=True)
BY_LAYER = replace(AS_LLAMA, name=PER_LAYER)


def is_llama(shape: ModelShape) -> bool:
    """Whether the layers compute what Llama's do, but for biases, RoPE's angles and windows."""
    plain = Layout(
        attention=shape.layout.attention, mlp=shape.layout.mlp, interleaved=shape.layout.interleaved
    )
    return (
        shape.layout == plain
        and shape.scales == Scales()
        and shape.activation == "silu"
        and all(x.rope == "" for x in shape.layers)
    )


def architecture_of(config: Any, shape: ModelShape, context: int) -> Architecture:
    """Raises ValueError for a model that llama.cpp has no architecture for."""
    uniform = len({(x.heads, x.kv_heads, x.channels) for x in shape.layers}) == 1
    if any(x.rope_pairs is not None for x in shape.layers):
        raise ValueError(
            "decision.space = 'head-dims' leaves heads that hold some of their RoPE pairs, which "
            "llama.cpp cannot rotate; train with --decision-space groups"
        )
    if any(not x.heads or not x.channels for x in shape.layers):
        raise ValueError("a layer has no attention or no MLP left, which GGUF has no place for")
    if is_llama(shape):
        found = AS_LLAMA if uniform else BY_LAYER
    elif shape.family not in OWN:
        raise ValueError(
            f"model_type {shape.family!r} has no GGUF form here; expected Llama's layers or one of "
            f"{', '.join(OWN)}; export it as ONNX"
        )
    elif not uniform:
        raise ValueError(
            f"{shape.family} with widths that differ by layer: llama.cpp reads such widths under "
            f"`deci` alone, whose layers are Llama's: {_not_llama(shape)}; train with "
            "--widths uniform"
        )
    else:
        found = OWN[shape.family]
    if fault := _fault(found, config, shape, context):
        raise ValueError(f"{fault}, which llama.cpp's {found.name!r} has no place for")
    return found


def _not_llama(shape: ModelShape) -> str:
    """In which way a family's layers are not Llama's."""
    if shape.qk_norm:
        return "no norms of queries and keys"
    if shape.scales != Scales():
        return "no factors on embedding, residual, scores or logits"
    return "no other norms, and RoPE in every layer"


def _fault(found: Architecture, config: Any, shape: ModelShape, context: int) -> str | None:
    """What an architecture does not read of a model; None: it reads all."""
    kinds = {name: rope["rope_type"] for name, rope in rope_settings(config).items() if rope}
    read = [(name, kind) for name, kind in kinds.items() if name in shape.ropes]
    for name, kind in read:
        stretched = kind == "dynamic" and rope_settings(config)[name].get("alpha")
        if kind not in found.ropes and not stretched:
            return f"rope_type {kind!r} (it reads {', '.join(found.ropes)})"
    first = shape.layers[0]
    if found.square and first.heads * first.head_dim != shape.hidden:
        return (
            f"{first.heads} heads of {first.head_dim} in a hidden size of {shape.hidden} (it wants "
            "all heads; export as ONNX)"
        )
    if found.head == "tied" and not shape.tied:
        return "a vocabulary head of its own"
    if shape.biased - found.biased:
        return f"a bias of {sorted(shape.biased - found.biased)[0]}"
    window = next((x.sliding_window for x in shape.layers if x.sliding_window), None)
    if window is not None and window < context and not found.windows:
        return (
            f"a sliding window of {window} tokens (it attends to everything; export with "
            f"--context {window} or less)"
        )
    return found.fault(shape)
