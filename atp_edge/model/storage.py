"""What every tensor of an exported decoder weighs: a pure function of sizes.

The graph's writers ask here how a matrix is kept, and write that; the byte budget and --dry-run add
the same tensors up. A matrix [K, N] of a quantized export is rounded in blocks of 32 along K:

- ort: `blocks` [N, blocks, 32 * bits / 8] as MatMulNBits reads them.
- standard, portable: `values` [K, N] of 4 or 8 bits as DequantizeLinear reads them.

K is padded to whole blocks; a block has a scale, and a zero point where the quantizer has one.
Norms, biases and rotary tables keep the graph's type.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from atp_edge.config import Flavour, Precision, Quantizer
from atp_edge.model.families import (
    LayerShape,
    ModelShape,
    Projection,
    longest_text,
    module_path,
    structured,
)
from atp_edge.model.structures import SiteKind

Bits = Literal[4, 8]
Kind = Literal["fp32", "fp16", "bf16", "int64", "int8", "int4", "uint8"]

BLOCK = 32
ALIGNMENT = 4096
"""Of tensors in the data file: consumers map them into memory at page boundaries."""
LONGEST_CONTEXT = 8192
"""Unless another one is asked for: tables and caches of 131,072 tokens are for few devices."""
INLINE_BYTES = 1024
"""A tensor of no more bytes lies in model.onnx itself."""

BITS: dict[Precision, Bits] = {"int8": 8, "int4": 4}
_BITS_OF: dict[Kind, int] = {
    "fp32": 32, "fp16": 16, "bf16": 16, "int64": 64, "int8": 8, "int4": 4, "uint8": 8,
}  # fmt: skip

SITE_KINDS: tuple[SiteKind, ...] = get_args(SiteKind)

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of the file."""

    name: str
    kind: Kind
    dims: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Row-major, two 4-bit values a byte."""
        return -(-math.prod(self.dims) * _BITS_OF[self.kind] // 8)

    @property
    def inline(self) -> bool:
        """Whether it lies in model.onnx itself."""
        return self.nbytes <= INLINE_BYTES

    @property
    def paged_bytes(self) -> int:
        """In the data file, with what aligns the next tensor."""
        return 0 if self.inline else -(-self.nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How an export keeps its tensors. rotary: [positions, pairs] of the tables."""

    flavour: Flavour
    precision: Precision
    rotary: tuple[int, int]
    quantizer: Quantizer = "nearest"
    adapter_rank: int | None = None
    """Every projection takes LoRA factors as optional inputs; those of an adapter beside the model
    have this rank. None: none is taken."""

    @property
    def bits(self) -> Bits | None:
        """Of a level of a matrix; None: matrices are in the graph's type."""
        return BITS.get(self.precision)

    @property
    def fused(self) -> bool:
        """Whether com.microsoft operators read the matrices."""
        return self.flavour == "ort"

    @property
    def kind(self) -> Kind:
        """The graph's type."""
        return self.precision if self.precision in ("fp16", "bf16") else "fp32"

    def matrix(self, name: str, rows: int, columns: int) -> tuple[Stored, ...]:
        """The tensors of a matrix [rows, columns] that inputs are multiplied by."""
        if self.bits is None:
            return (self.vector(f"{name}.weight", rows, columns),)
        blocks = -(-rows // BLOCK)
        if self.fused:
            size = BLOCK * self.bits // 8
            return self._quantized(name, (columns, blocks, size), columns, blocks)
        kind: Kind = "int4" if self.bits == 4 else "int8"
        levels = Stored(name=f"{name}.values", kind=kind, dims=(blocks * BLOCK, columns))
        scales = self.vector(f"{name}.scales", blocks, columns)
        zeros = Stored(name=f"{name}.zeros", kind=kind, dims=(blocks, columns))
        return (levels, scales, zeros) if self.has_zeros else (levels, scales)

    def table(self, name: str, tokens: int, hidden: int) -> tuple[Stored, ...]:
        """The tensors of an embedding [tokens, hidden] that nothing but rows are read of."""
        if self.bits is None:
            return (self.vector(f"{name}.weight", tokens, hidden),)
        blocks = -(-hidden // BLOCK)
        packed = (tokens, blocks * BLOCK * self.bits // 8)
        return self._quantized(name, packed, tokens, blocks)

    def _quantized(
        self, name: str, packed: tuple[int, ...], columns: int, blocks: int
    ) -> tuple[Stored, ...]:
        """Levels and zero points packed as com.microsoft operators read them."""
        assert self.bits is not None
        levels = Stored(name=f"{name}.blocks", kind="uint8", dims=packed)
        scales = self.vector(f"{name}.scales", columns, blocks)
        packed_zeros = (columns, -(-blocks * self.bits // 8))
        zeros = Stored(name=f"{name}.zeros", kind="uint8", dims=packed_zeros)
        return (levels, scales, zeros) if self.has_zeros else (levels, scales)

    @property
    def has_zeros(self) -> bool:
        """Whether a block's middle level need not mean 0."""
        return self.bits is not None and self.quantizer == "k-quant"

    def vector(self, name: str, *dims: int) -> Stored:
        """A tensor in the graph's type."""
        return Stored(name=name, kind=self.kind, dims=dims)


def context_of(config: Any, asked: int) -> int:
    """Tokens, prompt and new ones together, that an export is made for; 0: the model's own context,
    but `LONGEST_CONTEXT` at most. Raises ValueError for more than the model has."""
    own = longest_text(config)
    if asked > own:
        beyond = "" if own == config.max_position_embeddings else (
            f", and beyond them it computes attention otherwise (up to "
            f"{config.max_position_embeddings}), which no one graph does"
        )  # fmt: skip
        raise ValueError(
            f"a context of {asked} tokens: the model was made for {own}{beyond}; ask for that many "
            "or fewer (--export-context; of `export --to`, --context)"
        )
    return asked or min(own, LONGEST_CONTEXT)


def matrices_of(shape: ModelShape, kind: SiteKind) -> tuple[tuple[Projection, ...], ...]:
    """The projections of a site that are written as one matrix: q, k and v.

    Not gate and up where they are apart: no faster for one token (5.3 ms both ways at int4, 135M
    parameters, 2 cores), and the prefill of 128 tokens takes 173 ms instead of 159.
    """
    *writers, reader = shape.projections(kind)
    if kind == "attention":
        return tuple(writers), (reader,)
    return (*((writer,) for writer in writers), (reader,))


def linear_name(at: str, projections: Sequence[str]) -> str:
    """The name of projections as one matrix: `model.layers.0.self_attn.q_k_v`."""
    return f"{at}.{'_'.join(p.removesuffix('_proj') for p in projections)}"


def projections_named(label: str) -> list[str]:
    """The paths of the projections that a matrix of this name holds: the inverse of `linear_name`
    (`gate_up` is the fused projection: apart, the two are never one matrix)."""
    at, _, parts = label.rpartition(".")
    names = [parts] if parts == "gate_up" else parts.split("_")
    return [f"{at}.{name}_proj" for name in names]


def matrix_sizes(shape: ModelShape, layer: LayerShape, kind: SiteKind) -> list[tuple[int, int]]:
    """[in, out] of a site's matrices, in the order of `matrices_of`."""
    *writers, (reader,) = matrices_of(shape, kind)
    sizes = [
        (shape.hidden, sum(sum(structured(layer, name)) for name in names)) for names in writers
    ]
    return [*sizes, (sum(structured(layer, reader)), shape.hidden)]


def site_tensors(
    shape: ModelShape, storage: Storage, layer: LayerShape, kind: SiteKind, index: int
) -> Iterator[Stored]:
    """One site's tensors as they are written; none where it has no structures."""
    if not (layer.heads if kind == "attention" else layer.channels):
        return
    norms, head_norms = shape.layout.norms, shape.layout.head_norms
    before, after = (
        (norms.before_attention, norms.after_attention)
        if kind == "attention"
        else (norms.before_mlp, norms.after_mlp)
    )
    if before is not None:
        yield storage.vector(f"model.layers.{index}.{before}.weight", shape.hidden)
    matrices = matrices_of(shape, kind)
    at = module_path(index, matrices[0][0]).rpartition(".")[0]
    for projections, (rows, columns) in zip(
        matrices, matrix_sizes(shape, layer, kind), strict=True
    ):
        name = linear_name(at, projections)
        yield from storage.matrix(name, rows, columns)
        if not shape.biased.isdisjoint(projections):
            yield storage.vector(f"{name}.bias", columns)
        if kind == "attention" and projections == matrices[0] and head_norms is not None:
            whole = head_norms.over == "all"
            sizes = (layer.rows("q"), layer.rows("k")) if whole else (layer.head_dim,) * 2
            for norm, size in zip((head_norms.query, head_norms.key), sizes, strict=True):
                yield storage.vector(f"{at}.{norm}.weight", size)
    if after is not None:
        yield storage.vector(f"model.layers.{index}.{after}.weight", shape.hidden)


def rotary_names(rope: str) -> tuple[str, str]:
    """The names of a rotary table's tensors, cos and sin; rope: as layers name it."""
    at = f"rotary.{rope}." if rope else "rotary."
    return f"{at}cos", f"{at}sin"


def around_tensors(shape: ModelShape, storage: Storage) -> tuple[list[Stored], list[Stored]]:
    """The tensors before the layers and those after them: tables, embedding, norm, head."""
    before = [
        storage.vector(name, *storage.rotary) for rope in shape.ropes for name in rotary_names(rope)
    ]
    after = [storage.vector("model.norm.weight", shape.hidden)]
    head = storage.matrix(HEAD, shape.hidden, shape.vocabulary)
    if shape.tied and storage.bits is not None:
        before += head
    else:
        before += storage.table(EMBEDDING, shape.vocabulary, shape.hidden)
    if not shape.tied:
        after += head
    return before, after


def decoder_tensors(shape: ModelShape, storage: Storage) -> Iterator[Stored]:
    """Every tensor but constants of a few numbers, in the order of the file."""
    before, after = around_tensors(shape, storage)
    yield from before
    for i, layer in enumerate(shape.layers):
        for kind in SITE_KINDS:
            yield from site_tensors(shape, storage, layer, kind, i)
    yield from after


def data_bytes(tensors: Iterable[Stored]) -> int:
    """The data file, exactly: each tensor at a page's beginning, nothing after the last."""
    external = [tensor for tensor in tensors if not tensor.inline]
    if not external:
        return 0
    return sum(t.paged_bytes for t in external[:-1]) + external[-1].nbytes
