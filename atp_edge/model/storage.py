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
from typing import Any, Literal

from atp_edge.config import Flavour, Precision, Quantizer
from atp_edge.model.families import LayerShape, ModelShape, Projection, module_path
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

MATRICES: dict[SiteKind, tuple[tuple[Projection, ...], ...]] = {
    "attention": (("q_proj", "k_proj", "v_proj"), ("o_proj",)),
    "mlp": (("gate_proj",), ("up_proj",), ("down_proj",)),
}
"""The projections of a site that are written as one matrix."""
_NORM_OF: dict[SiteKind, str] = {
    "attention": "input_layernorm",
    "mlp": "post_attention_layernorm",
}

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
    own: int = config.max_position_embeddings
    if asked > own:
        raise ValueError(
            f"a context of {asked} tokens (--export-context): the model was made for {own}; ask "
            "for that many or fewer"
        )
    return asked or min(own, LONGEST_CONTEXT)


def linear_name(at: str, projections: Sequence[str]) -> str:
    """The name of projections as one matrix: `model.layers.0.self_attn.q_k_v`."""
    return f"{at}.{'_'.join(p.removesuffix('_proj') for p in projections)}"


def matrix_sizes(shape: ModelShape, layer: LayerShape, kind: SiteKind) -> list[tuple[int, int]]:
    """[in, out] of a site's matrices, in the order of `MATRICES`."""
    if kind == "mlp":
        wide = (shape.hidden, layer.channels)
        return [wide, wide, wide[::-1]]
    queries = layer.heads * layer.head_dim
    packed = queries + 2 * layer.kv_heads * layer.head_dim
    return [(shape.hidden, packed), (queries, shape.hidden)]


def site_tensors(
    shape: ModelShape, storage: Storage, layer: LayerShape, kind: SiteKind, index: int
) -> Iterator[Stored]:
    """One site's tensors as they are written; none where it has no structures."""
    if not (layer.heads if kind == "attention" else layer.channels):
        return
    yield storage.vector(f"model.layers.{index}.{_NORM_OF[kind]}.weight", shape.hidden)
    at = module_path(index, MATRICES[kind][0][0]).rpartition(".")[0]
    sizes = matrix_sizes(shape, layer, kind)
    for projections, (rows, columns) in zip(MATRICES[kind], sizes, strict=True):
        name = linear_name(at, projections)
        yield from storage.matrix(name, rows, columns)
        if not shape.biased.isdisjoint(projections):
            yield storage.vector(f"{name}.bias", columns)
        if "q_proj" in projections and shape.qk_norm:
            for norm in ("q_norm", "k_norm"):
                yield storage.vector(f"{at}.{norm}.weight", layer.head_dim)


def around_tensors(shape: ModelShape, storage: Storage) -> tuple[list[Stored], list[Stored]]:
    """The tensors before the layers and those after them: tables, embedding, norm, head."""
    before = [storage.vector(f"rotary.{table}", *storage.rotary) for table in ("cos", "sin")]
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
        for kind in MATRICES:
            yield from site_tensors(shape, storage, layer, kind, i)
    yield from after


def data_bytes(tensors: Iterable[Stored]) -> int:
    """The data file, exactly: each tensor at a page's beginning, nothing after the last."""
    external = [tensor for tensor in tensors if not tensor.inline]
    if not external:
        return 0
    return sum(t.paged_bytes for t in external[:-1]) + external[-1].nbytes
