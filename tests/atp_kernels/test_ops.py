"""The registered operators on the torch path: gradients, the compiler, checkpoints, 4 bits.

The same operators on Triton are in triton_cases.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from atp_kernels import LoraLayer, masked_lora_linear, masked_qkv, masked_swiglu_mlp, reference
from atp_kernels.compact_lora import prefix_lora_linears
from atp_kernels.masked_gemm import masked_gemm
from atp_kernels.masked_lora import fused_masked_lora
from atp_kernels.swiglu import swiglu_backward, swiglu_forward
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Leaves = list[Tensor]


def leaves(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Leaves:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=draw, dtype=dtype).requires_grad_() for s in shapes]


def layer_leaves(**options: Any) -> Leaves:
    """x, W, A, B, bias, output mask, input mask."""
    return leaves((5, 12), (9, 12), (3, 12), (9, 3), (9,), (9,), (12,), **options)


@pytest.mark.parametrize("placement", ["base", "whole"])
def test_gradcheck_of_the_fused_layer(placement: Any) -> None:
    def fused(*values: Tensor) -> Tensor:
        return fused_masked_lora(*values, 0.5, placement)  # type: ignore[arg-type, call-arg]

    def plain(*values: Tensor) -> Tensor:
        x, w, a, b, bias, om, im = values
        return reference.masked_lora_linear(x, w, a, b, bias=bias, out_mask=om, in_mask=im,
                                            scaling=0.5, placement=placement)  # fmt: skip

    values = layer_leaves()
    torch.testing.assert_close(fused(*values), plain(*values))
    assert torch.autograd.gradcheck(fused, values)


@pytest.mark.parametrize("placement", ["base", "whole"])
@pytest.mark.parametrize("fixed", [False, True])
def test_gradcheck_of_the_mlp_and_of_qkv(placement: Any, fixed: bool) -> None:
    x, gate, up, down, mask, groups = leaves((4, 6), (7, 6), (7, 6), (6, 7), (7,), (3,))
    factors = leaves(
        (2, 6), (7, 2), (2, 6), (7, 2), (2, 7), (6, 2), (24, 6), (2, 6), (12, 2), seed=1
    )

    def both(x: Tensor, mask: Tensor, groups: Tensor, *f: Tensor) -> tuple[Tensor, ...]:
        parts = [LoraLayer(weight=w, lora_a=f[2 * i], lora_b=f[2 * i + 1])
                 for i, w in enumerate((gate, up, down))]  # fmt: skip
        y = masked_swiglu_mlp(x, *parts, mask, scaling=0.5, placement=placement)
        loras = ((f[7], f[8]), (f[7], f[8][:6]), (f[7], f[8][6:]))
        return y, *masked_qkv(x, f[6], loras, groups, group_heads=2, head_dim=2, scaling=0.5,
                              placement=placement)  # fmt: skip

    masks = [mask.detach() > 0, groups.detach() > 0] if fixed else [mask, groups]
    y, q, k, v = both(x, *masks, *factors)
    h = torch.nn.functional.silu(_lora(x, gate, factors[:2], placement, masks[0], None))
    h = h * _lora(x, up, factors[2:4], placement, masks[0], None)
    if placement == "whole" and not fixed:
        e, u = (
            _lora(x, w, factors[i : i + 2], "whole", None, None) for i, w in ((0, gate), (2, up))
        )
        h = torch.nn.functional.silu(e) * u
    torch.testing.assert_close(y, _lora(h, down, factors[4:6], placement, None, masks[0]))
    assert [t.shape[-1] for t in (q, k, v)] == [12, 6, 6]
    q_mask = masks[1].repeat_interleave(4)
    torch.testing.assert_close(q, _lora(x, factors[6][:12], factors[7:9], placement, q_mask, None))
    assert torch.autograd.gradcheck(both, (x, *masks, *factors))


def _lora(
    x: Tensor, w: Tensor, ab: Leaves, placement: Any, om: Tensor | None, im: Tensor | None
) -> Tensor:
    return reference.masked_lora_linear(x, w, *ab, out_mask=om, in_mask=im, scaling=0.5,
                                        placement=placement)  # fmt: skip


@pytest.mark.parametrize(("rows", "columns"), [(9, 12), (4, 12), (9, 5), (0, 0)])
def test_gradcheck_of_prefixes(rows: int, columns: int) -> None:
    x, a, b, c, d = leaves((5, 12), (3, 12), (9, 3), (2, 12), (9, 2))
    w, v, bias = leaves((rows, columns), (rows, columns), (rows,), seed=1)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        x, w, a, b, bias, v, c, d = values
        layers = [LoraLayer(weight=w, lora_a=a, lora_b=b, bias=bias),
                  LoraLayer(weight=v, lora_a=c, lora_b=d)]  # fmt: skip
        return tuple(prefix_lora_linears(x, layers, scaling=0.5))

    wide = torch.nn.functional.pad(w, (0, 12 - columns, 0, 9 - rows))
    wide_bias = torch.nn.functional.pad(bias, (0, 9 - rows))
    want = reference.masked_lora_linear(x, wide, a, b, bias=wide_bias, scaling=0.5)
    values = (x, w, a, b, bias, v, c, d)
    torch.testing.assert_close(function(*values)[0], want)
    assert torch.autograd.gradcheck(function, values)


def test_a_prefix_wider_than_its_layer_is_refused() -> None:
    x, w, a, b = leaves((5, 12), (10, 12), (3, 12), (9, 3))
    with pytest.raises(ValueError, match=r"weight \(10, 12\) does not fit B \(9, 3\)"):
        prefix_lora_linears(x, [LoraLayer(weight=w, lora_a=a, lora_b=b)], scaling=1.0)


@pytest.mark.parametrize("reduced", [False, True])
def test_opcheck_with_non_contiguous_inputs(reduced: bool) -> None:
    x, w, s, b, other = leaves((12, 5), (12, 9), (5, 3), (3, 9), (5, 9), dtype=torch.float32)
    om, im = torch.rand(9) < 0.5, torch.rand(12) < 0.5
    arguments = (x.detach().T, w.detach().T, s.detach(), b.detach().T, None, om, im, True,
                 other.detach() if reduced else None)  # fmt: skip
    torch.library.opcheck(masked_gemm, arguments)
    e, u, dh = (t.detach() for t in leaves((5, 9), (5, 9), (5, 9), dtype=torch.float32))
    torch.library.opcheck(swiglu_forward, (e, u, om))
    torch.library.opcheck(swiglu_backward, (dh, e, u, om.float()))


def test_compiles_whole_without_a_graph_break() -> None:
    values = layer_leaves(dtype=torch.float32)

    def loss(*values: Tensor) -> Tensor:
        x, w, a, b, bias, om, im = values
        return fused_masked_lora(x, w, a, b, bias, om, im, 0.5, "whole").square().sum()

    # aot_eager: dynamo and autograd's partition as in any backend, without a C++ compiler.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, want in zip(
        torch.autograd.grad(compiled(*values), values),
        torch.autograd.grad(loss(*values), values),
        strict=True,
    ):
        torch.testing.assert_close(ours, want)


def test_checkpointing_and_autocast() -> None:
    x, w, a, b, bias, om, im = values = layer_leaves(dtype=torch.float32)

    def layer(x: Tensor) -> Tensor:
        return fused_masked_lora(x, w, a, b, bias, om, im, 0.5, "base")

    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, again = layer(x), checkpoint(layer, x, use_reentrant=False)
    assert plain.dtype == torch.bfloat16
    found = [torch.autograd.grad(y.float().square().sum(), values) for y in (plain, again)]
    for one, two in zip(*found, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, two)


def test_a_4_bit_weight_is_dequantized() -> None:
    # Not in `dev`: peft imports it where it is, and it then prints at every start of the command.
    bnb = pytest.importorskip(
        "bitsandbytes", reason="needs `pip install bitsandbytes` (a CPU will do)"
    )
    x, w, a, b = (
        t.detach() for t in leaves((5, 64), (128, 64), (3, 64), (128, 3), dtype=torch.float32)
    )
    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4")
    quantized = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, bnb_quantized=True
    )
    dense = bnb.functional.dequantize_4bit(packed, state)
    assert 0 < float((dense - w).abs().max()) < 1
    mask = torch.rand(128) < 0.5
    ours = masked_lora_linear(x, quantized, a, b, out_mask=mask)
    torch.testing.assert_close(ours, reference.masked_lora_linear(x, dense, a, b, out_mask=mask))
