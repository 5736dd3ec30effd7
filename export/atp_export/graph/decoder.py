"""A decoder as an ONNX graph: one description, written with the operators of a flavour.

Every layer takes its own widths from the model's shape; a layer without heads or without channels
passes the residual on. Logits are computed from the position `logits_from` on, a constant 0 that
our runtime makes an input (see atp_export.runtime.logits_from).
"""

from __future__ import annotations

import torch

from atp_edge.config import Flavour
from atp_edge.model.families import LayerShape, ModelShape
from atp_edge.model.storage import MATRICES
from atp_export.graph.builder import GraphBuilder
from atp_export.graph.embedding import VocabularyWriter
from atp_export.graph.flavour import FLOAT, INT64, Operators, Rotary, Shared, cache_of
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
        self, g: GraphBuilder, shape: ModelShape, matrices: MatrixWriter, rotary: Rotary
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
        residual, added = self._layers(vocabulary.embed(shared.tokens or ids), shared)
        hidden, _ = self._norm(residual, added, "model.norm.weight", "final_norm")
        # Logits are fp32 whatever the weights are: samplers and JavaScript expect it.
        logits = vocabulary.head(self._wanted(hidden, shared))
        self.g.node("Cast", [logits], name="cast_logits", outputs=["logits"], to=FLOAT)

    def _layers(self, residual: str, shared: Shared) -> tuple[str, str | None]:
        """(the stream before the last addition, what is still to be added to it)."""
        added: str | None = None
        cache = 0
        for i, layer in enumerate(self.shape.layers):
            at = f"model.layers.{i}"
            if layer.heads:
                weight = f"{at}.input_layernorm.weight"
                hidden, residual = self._norm(residual, added, weight, f"{at}.input_norm")
                added = self._attention(hidden, i, cache, shared)
                cache += 1
            if layer.channels:
                weight = f"{at}.post_attention_layernorm.weight"
                hidden, residual = self._norm(residual, added, weight, f"{at}.mlp_norm")
                added = self._mlp(hidden, i)
        return residual, added

    def _norm(self, residual: str, added: str | None, weight: str, name: str) -> tuple[str, str]:
        """RMS norm of residual + added: (normalized, the sum)."""
        scale = self.matrices.vector(weight)
        if added is None:
            return self.ops.norm(self.g, residual, scale, self.shape.norm_eps, name), residual
        return self.ops.add_norm(self.g, residual, added, scale, self.shape.norm_eps, name)

    def _attention(self, hidden: str, index: int, cache: int, shared: Shared) -> str:
        layer, at = self.shape.layers[index], f"model.layers.{index}.self_attn"
        qkv, o = MATRICES["attention"]
        place = cache_of(self.g, layer, index, cache)
        q = self.matrices.linear(hidden, at, qkv)
        k = v = ""
        if self.shape.qk_norm or not self.ops.packed_qkv:
            q, k, v = self._split(q, layer, at)
        if self.shape.qk_norm:
            q = self._head_norm(q, layer, f"{at}.q_norm")
            k = self._head_norm(k, layer, f"{at}.k_norm")
        context = self.ops.attend(self.g, place, shared, q, k, v)
        return self.matrices.linear(context, at, o)

    def _split(self, qkv: str, layer: LayerShape, at: str) -> list[str]:
        sizes = [layer.heads * layer.head_dim] + [layer.kv_heads * layer.head_dim] * 2
        return self.g.node(
            "Split", [qkv, self.g.constant(sizes)], name=f"{at}.split", outputs=3, axis=-1
        )

    def _head_norm(self, x: str, layer: LayerShape, name: str) -> str:
        """RMS norm over each head (Qwen3), in its own nodes: the CPU kernel takes none inside."""
        heads = self.g.node("Reshape", [x, self.g.constant([0, 0, -1, layer.head_dim])])
        scale = self.matrices.vector(f"{name}.weight")
        normed = self.ops.norm(self.g, heads, scale, self.shape.norm_eps, name)
        return self.g.node("Reshape", [normed, self.g.constant([0, 0, -1])])

    def _mlp(self, hidden: str, index: int) -> str:
        at = f"model.layers.{index}.mlp"
        # Not packed: no faster for one token (5.3 ms both ways at int4, 135M parameters, 2 cores),
        # and the prefill of 128 tokens takes 173 ms instead of 159.
        gate, up, down = MATRICES["mlp"]
        gated = self.matrices.linear(hidden, at, gate)
        linear = self.matrices.linear(hidden, at, up)
        # ONNX Runtime fuses x * sigmoid(x).
        silu = self.g.node("Mul", [gated, self.g.node("Sigmoid", [gated])])
        return self.matrices.linear(self.g.node("Mul", [silu, linear]), at, down)

    def _wanted(self, hidden: str, shared: Shared) -> str:
        """The positions whose logits are asked for, in the order that the tokens came in."""
        start = self.g.tensor(LOGITS_FROM, torch.zeros(1, dtype=torch.int64))
        ends = [start, self.g.constant([_END]), self.g.constant([1])]
        wanted = self.g.node("Slice", [shared.places or hidden, *ends], name="wanted")
        if not shared.places:
            return wanted
        rows = self.g.node("Reshape", [hidden, self.g.constant([-1, self.shape.hidden])])
        return self.g.node("Gather", [rows, wanted], name="as_they_came")
