"""A decoder as an ONNX graph: one description, written with the operators of a flavour.

Every layer takes its own widths and its arithmetic from the model's shape; a layer without heads or
without channels passes the residual on. Logits are computed from the position `logits_from` on, a
constant 0 that our runtime makes an input (see atp_export.runtime.logits_from).
"""

from __future__ import annotations

from functools import partial

import torch

from atp_edge.config import Flavour
from atp_edge.model.families import LayerShape, ModelShape
from atp_edge.model.storage import matrices_of
from atp_export.graph.builder import GraphBuilder
from atp_export.graph.embedding import VocabularyWriter
from atp_export.graph.flavour import (
    FLOAT,
    INT64,
    Operators,
    Rotaries,
    Shared,
    cache_of,
    capped,
    number,
    rotary_of,
    times,
)
from atp_export.graph.flavour_onnx import PORTABLE, STANDARD
from atp_export.graph.flavour_ort import FUSED
from atp_export.graph.matrix import MatrixWriter
from atp_export.runtime.logits_from import LOGITS_FROM

OPERATORS: dict[Flavour, Operators] = {
    "ort": FUSED,
    "standard": STANDARD,
    "portable": PORTABLE,
}
_END = 2**31 - 1


class DecoderWriter:
    """Adds a decoder to a graph. Its methods take and return names of hidden states [B, S, H]."""

    def __init__(
        self, g: GraphBuilder, shape: ModelShape, matrices: MatrixWriter, rotary: Rotaries
    ) -> None:
        self.g, self.shape, self.matrices, self.rotary = g, shape, matrices, rotary
        self.ops = OPERATORS[matrices.storage.flavour]

    def write(self) -> None:
        """The whole decoder: inputs, layers with their caches, logits."""
        self.g.output("logits", FLOAT, ["batch_size", "logits_length", self.shape.vocabulary])
        ids = self.g.input("input_ids", INT64, ["batch_size", "sequence_length"])
        mask = self.g.input("attention_mask", INT64, ["batch_size", "total_sequence_length"])
        shared = self.ops.inputs(self.g, self.shape, ids, mask, self.rotary)
        vocabulary = VocabularyWriter(self.g, self.shape, self.matrices)
        embedded = vocabulary.embed(shared.tokens or ids)
        scaled = times(self.g, embedded, self.shape.scales.embedding, name="embed.scaled")
        residual, added = self._layers(scaled, shared)
        hidden, _ = self._norm(residual, added, "model.norm", "final_norm")
        self._logits(vocabulary.head(self._wanted(hidden, shared)))

    def _logits(self, head: str) -> None:
        """The head's products in fp32, whatever the weights are (samplers and JavaScript expect
        it), scaled and capped."""
        g, scales = self.g, self.shape.scales
        if scales.logits == 1 and scales.logit_cap is None:
            g.node("Cast", [head], name="cast_logits", outputs=["logits"], to=FLOAT)
            return
        wide = g.node("Cast", [head], name="cast_logits", to=FLOAT)
        if scales.logits != 1:
            wide = g.node("Mul", [wide, number(g, scales.logits)])
        g.node("Identity", [capped(g, wide, scales.logit_cap)], outputs=["logits"])

    def _layers(self, residual: str, shared: Shared) -> tuple[str, str | None]:
        """(the stream before the last addition, what is still to be added to it)."""
        norms = self.shape.layout.norms
        added: str | None = None
        cache = 0
        for i, layer in enumerate(self.shape.layers):
            at = f"model.layers.{i}"
            if layer.heads:
                hidden, residual = self._enter(residual, added, at, norms.before_attention, "input")
                added = self._attention(hidden, i, cache, shared)
                added = self._leave(added, at, norms.after_attention, "attention")
                cache += 1
            if layer.channels:
                hidden, residual = self._enter(residual, added, at, norms.before_mlp, "mlp")
                added = self._leave(self._mlp(hidden, i), at, norms.after_mlp, "mlp")
        return residual, added

    def _enter(
        self, residual: str, added: str | None, at: str, norm: str | None, what: str
    ) -> tuple[str, str]:
        """(what an attention or MLP reads, the stream beside it)."""
        name = f"{at}.{what}_norm"
        if norm is not None:
            return self._norm(residual, added, f"{at}.{norm}", name)
        if added is not None:
            residual = self.g.node("Add", [residual, added], name=f"{name}.sum")
        return residual, residual

    def _leave(self, x: str, at: str, norm: str | None, what: str) -> str:
        """What an attention or MLP adds to the stream."""
        if norm is not None:
            scale = self._norm_scale(f"{at}.{norm}")
            x = self.ops.norm(self.g, x, scale, self.shape.norm_eps, f"{at}.{what}_left")
        return times(self.g, x, self.shape.scales.residual)

    def _norm(self, residual: str, added: str | None, module: str, name: str) -> tuple[str, str]:
        """RMS norm of residual + added: (normalized, the sum)."""
        scale = self._norm_scale(module)
        if added is None:
            return self.ops.norm(self.g, residual, scale, self.shape.norm_eps, name), residual
        return self.ops.add_norm(self.g, residual, added, scale, self.shape.norm_eps, name)

    def _norm_scale(self, module: str) -> str:
        """What a norm multiplies by: its weight, or 1 + its weight, which runtimes add up once."""
        weight = self.matrices.vector(f"{module}.weight")
        if not self.shape.layout.norm_offset:
            return weight
        offset = self.shape.layout.norm_offset
        label = f"const.offset.{offset}"
        if not self.g.has(label):
            self.g.weight(label, torch.tensor(offset))
        return self.g.node("Add", [weight, label], name=f"{module}.scale")

    def _attention(self, hidden: str, index: int, cache: int, shared: Shared) -> str:
        layer, at = self.shape.layers[index], f"model.layers.{index}.self_attn"
        qkv, o = matrices_of(self.shape, "attention")
        place, norms = cache_of(self.g, self.shape, index, cache), self.shape.layout.head_norms
        q = self.matrices.linear(hidden, at, qkv)
        k = v = ""
        if norms is not None or not self.ops.packed_qkv:
            q, k, v = self._split(q, layer, at)
        if norms is not None:
            if norms.after_rope and layer.rope is not None:
                turn = partial(self.ops.rotate, self.g, place, shared)
                tables = rotary_of(self.g, place, shared)
                q = turn(tables, q, layer.heads, f"{at}.q_turned")
                k = turn(tables, k, layer.kv_heads, f"{at}.k_turned")
            size = layer.head_dim if norms.over == "head" else None
            q = self._head_norm(q, size, f"{at}.{norms.query}")
            k = self._head_norm(k, size, f"{at}.{norms.key}")
        context = self.ops.attend(self.g, place, shared, q, k, v)
        return self.matrices.linear(context, at, o)

    def _split(self, qkv: str, layer: LayerShape, at: str) -> list[str]:
        sizes = [layer.heads * layer.head_dim] + [layer.kv_heads * layer.head_dim] * 2
        return self.g.node(
            "Split", [qkv, self.g.constant(sizes)], name=f"{at}.split", outputs=3, axis=-1
        )

    def _head_norm(self, x: str, head_dim: int | None, name: str) -> str:
        """RMS norm over each head (Qwen3), or over all together, in nodes of its own: the CPU's
        kernel takes none inside."""
        scale, eps = self._norm_scale(name), self.shape.norm_eps
        if head_dim is None:
            return self.ops.norm(self.g, x, scale, eps, name)
        heads = self.g.node("Reshape", [x, self.g.constant([0, 0, -1, head_dim])])
        normed = self.ops.norm(self.g, heads, scale, eps, name)
        return self.g.node("Reshape", [normed, self.g.constant([0, 0, -1])])

    def _mlp(self, hidden: str, index: int) -> str:
        at = f"model.layers.{index}.mlp"
        *writers, down = matrices_of(self.shape, "mlp")
        products = [self.matrices.linear(hidden, at, names) for names in writers]
        if len(products) == 1:
            halves = self.g.constant([self.shape.layers[index].channels] * 2)
            split = [products[0], halves]
            products = self.g.node("Split", split, name=f"{at}.split", outputs=2, axis=-1)
        gate, up = products
        if self.shape.activation == "gelu_tanh":
            active = self.ops.gelu(self.g, gate)
        else:  # ONNX Runtime fuses x * sigmoid(x).
            active = self.g.node("Mul", [gate, self.g.node("Sigmoid", [gate])])
        return self.matrices.linear(self.g.node("Mul", [active, up]), at, down)

    def _wanted(self, hidden: str, shared: Shared) -> str:
        """The positions whose logits are asked for, in the order that the tokens came in."""
        start = self.g.tensor(LOGITS_FROM, torch.zeros(1, dtype=torch.int64))
        ends = [start, self.g.constant([_END]), self.g.constant([1])]
        wanted = self.g.node("Slice", [shared.places or hidden, *ends], name="wanted")
        if not shared.places:
            return wanted
        rows = self.g.node("Reshape", [hidden, self.g.constant([-1, self.shape.hidden])])
        return self.g.node("Gather", [rows, wanted], name="as_they_came")
