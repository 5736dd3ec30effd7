"""The fused elementwise operators on Triton, with every gradient; test_triton.py runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from atp_kernels import fused_norm, mask_scored, reference, rope_qkv, shrink_removed, swiglu_of_both
from atp_kernels.norm import norm_into
from atp_kernels.proximal import proximal_step
from atp_kernels.swiglu import masked_swiglu, plain_swiglu, swiglu_backward, swiglu_forward
from torch import Tensor

from tests.atp_kernels import interpreted_bf16
from tests.atp_kernels.float64_bounds import assert_close, leaves_of
from tests.triton_process import DEVICE, INTERPRETED

if INTERPRETED:
    interpreted_bf16.patch()
TYPES = (torch.float32, torch.float16, torch.bfloat16)
in_types = pytest.mark.parametrize("dtype", TYPES, ids=str)
OPERATORS = ("norm", "swiglu", "rope", "scored_mask", "proximal")


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw).to(DEVICE, dtype)


@contextmanager
def on_torch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATORS:
            patch.setattr(f"atp_kernels.{name}.fuses", lambda x: False)
        yield


def assert_right(
    call: Callable[..., list[Tensor]], inputs: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Outputs and the gradients of all inputs, as near to float64 as plain torch's."""

    def result(kind: torch.dtype, draw: int | None) -> list[Tensor]:
        arguments, leaves = leaves_of(inputs, kind, draw)
        found = call(**arguments)
        weights = [drawn(*y.shape, seed=90 + i) for i, y in enumerate(found)]
        loss = sum((y.double() * w.double()).sum() for y, w in zip(found, weights, strict=True))
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)  # type: ignore[arg-type]
        return [*(y.detach() for y in found), *(g for g in gradients if g is not None)]

    ours = result(dtype, None)
    with on_torch():
        plain = result(dtype, None)
    assert_close(ours, plain, lambda draw: result(torch.float64, draw), units=4)


@in_types
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(("m", "k", "rank"), [(3, 40, 0), (21, 130, 5), (17, 64, 70)])
def test_norm(m: int, k: int, rank: int, delta: bool, dtype: torch.dtype) -> None:
    inputs = {"stream": drawn(m, k, seed=1, dtype=dtype), "weight": drawn(k, seed=2, dtype=dtype)}
    inputs |= {"delta": drawn(m, k, seed=3, dtype=dtype)} if delta else {}
    inputs |= {"a": drawn(rank, k, seed=4, dtype=dtype) / k**0.5} if rank else {}
    room = -(-rank // 64) * 64

    def call(stream: Tensor, weight: Tensor, **more: Any) -> list[Tensor]:
        a = more.get("a")
        new, x = fused_norm(
            stream, more.get("delta"), weight.detach(), 1e-5, kind=stream.dtype, room=room,
            a=None if a is None else a.detach(),
        )  # fmt: skip
        beside = x.roomy[:, k:].detach()  # type: ignore[attr-defined]
        assert beside.shape[1] == room
        assert not beside[:, rank:].any()
        return [y for y in (new if delta else None, x, beside) if y is not None and y.numel()]

    assert_right(call, inputs, dtype)


def test_a_stream_in_fp32_gives_x_in_bf16() -> None:
    stream, delta = drawn(6, 32, seed=1), drawn(6, 32, seed=2, dtype=torch.bfloat16)
    new, whole, _ = norm_into(stream, delta, torch.ones(32, device=DEVICE), 1e-6, None, 0,
                              torch.bfloat16)  # fmt: skip
    want, x, _ = reference.norm_into(stream, delta, torch.ones(32, device=DEVICE), 1e-6, None, 0,
                                     torch.bfloat16)  # fmt: skip
    assert (new.dtype, whole.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(new, want)
    torch.testing.assert_close(whole, x, atol=0, rtol=8e-3)


@in_types
@pytest.mark.parametrize(("m", "n", "rank"), [(5, 33, 0), (18, 100, 6), (40, 130, 65)])
def test_swiglu_with_what_stands_beside_it(m: int, n: int, rank: int, dtype: torch.dtype) -> None:
    inputs = {"gate_up": drawn(m, 2 * n, seed=1, dtype=dtype)}
    inputs |= {"a": drawn(rank, n, seed=2, dtype=dtype) / n**0.5} if rank else {}
    room = -(-rank // 64) * 64

    def call(gate_up: Tensor, a: Tensor | None = None) -> list[Tensor]:
        h = swiglu_of_both(gate_up, None if a is None else a.detach(), room)
        beside = h.roomy[:, n:].detach()  # type: ignore[attr-defined]
        assert not beside[:, rank:].any()
        return [h, beside] if rank else [h]

    assert_right(call, inputs, dtype)


@in_types
@pytest.mark.parametrize("masked", [False, True])
def test_swiglu_with_its_masks_gradient_and_importance(masked: bool, dtype: torch.dtype) -> None:
    inputs = {"e": drawn(35, 140, seed=1, dtype=dtype), "u": drawn(35, 140, seed=2, dtype=dtype)}
    inputs |= {"mask": torch.rand(140, device=DEVICE).to(dtype)} if masked else {}

    def call(e: Tensor, u: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        return [plain_swiglu(e, u) if mask is None else masked_swiglu(e, u, mask)]

    assert_right(call, inputs, dtype)


@in_types
@pytest.mark.parametrize("channels", [False, True], ids=["of heads", "of channels"])
def test_importance_and_mask_gradient_in_one_pass(channels: bool, dtype: torch.dtype) -> None:
    """Every structure's importance is that of its definition."""
    size, width = (17, 1) if channels else (3, 150)
    inputs = {"z": drawn(37, size * width, seed=1, dtype=dtype),
              "mask": torch.rand(size, device=DEVICE).to(dtype)}  # fmt: skip
    assert_right(lambda z, mask: [mask_scored(z, mask)], inputs, dtype)
    z, mask = (value.detach().requires_grad_() for value in inputs.values())
    g, score = drawn(37, size * width, seed=2, dtype=dtype), torch.zeros(size, device=DEVICE)
    torch.autograd.grad(mask_scored(z, mask, score=score), (z, mask), g)
    product = (z.double() * g.double()).abs().unflatten(1, (size, -1)).sum(2)
    torch.testing.assert_close(score.double(), product.square().sum(0), rtol=1e-5, atol=1e-6)
    if channels:
        e, u = drawn(37, size, seed=3, dtype=dtype), drawn(37, size, seed=4, dtype=dtype)
        score.zero_()
        h = masked_swiglu(e.requires_grad_(), u, mask, score=score)
        torch.autograd.grad(h, e, g)
        h = torch.nn.functional.silu(e.double()) * u.double()
        want = (h * g.double()).square().sum(0)
        torch.testing.assert_close(score.double(), want, rtol=1e-5, atol=1e-6)


@in_types
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 8), (3, 0, 20), (2, 1, 64)])
def test_rope(heads: int, groups: int, size: int, dtype: torch.dtype) -> None:
    packed = drawn(2, 35, (heads + 2 * groups) * size, seed=1, dtype=dtype)
    angles = drawn(1, 35, size, seed=2).double()
    kinds = (*TYPES, torch.float64)
    turns = {kind: (angles.cos().to(kind), angles.sin().to(kind)) for kind in kinds}

    def call(packed: Tensor) -> list[Tensor]:
        found = rope_qkv(packed, *turns[packed.dtype], heads=heads, groups=groups)
        return [x for x in found if x.numel()]

    assert_right(call, {"packed": packed}, dtype)


def test_proximal_step_on_all_factors_at_once() -> None:
    """Views of rows, of columns and of fused parts; those that stay are the very same bits."""
    factors = [drawn(40, 4, seed=1), drawn(6, 60, seed=2), drawn(36, 70, seed=3)]
    stays = [torch.rand(n, device=DEVICE) < 0.5 for n in (40, 3, 3)]
    shapes: list[Callable[[Tensor], Tensor]] = [
        lambda w: w.unflatten(0, (40, -1)),
        lambda w: w.unflatten(1, (3, -1)).movedim(1, 0),
        lambda w: w[6:36].unflatten(0, (3, -1)),
    ]
    results = []
    for run in (shrink_removed, reference.proximal_step):
        made = [factor.clone() for factor in factors]
        views = [shape(factor) for shape, factor in zip(shapes, made, strict=True)]
        before = [factor._version for factor in made]
        run(views, stays, 3.0)
        assert all(now._version > was for now, was in zip(made, before, strict=True))
        results.append((made, views))
    for ours, want in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(ours, want)
    for view, factor, shape, stay in zip(results[0][1], factors, shapes, stays, strict=True):
        assert torch.equal(view[stay], shape(factor)[stay])
    removed = [view[~stay].flatten(1) for view, stay in zip(results[0][1], stays, strict=True)]
    assert any((rows == 0).all(1).any() for rows in removed), "nothing was as small as the step"


def test_nothing_to_do() -> None:
    empty, ones = torch.empty(0, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    for h in (swiglu_forward(empty, empty, ones), *swiglu_backward(empty, empty, empty, ones)):
        assert not h.any()
    assert not fused_norm(empty, empty, ones, 1e-6, kind=torch.float32)[1].numel()


def test_registered_with_their_shapes() -> None:
    """torch's own check of operators: schemas, fakes, aliases."""
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    e, u, mask, a = drawn(5, 9, seed=1), drawn(5, 9, seed=2), drawn(9, seed=3), drawn(2, 9, seed=4)
    check(swiglu_forward, (e, u, mask, a, 64))
    check(swiglu_backward, (e, e, u, mask))
    check(norm_into, (e, u, mask, 1e-6, a, 64, torch.float32))
    check(torch.ops.atp.norm_backward.default, (e, u, mask, mask[:5], e))
    check(torch.ops.atp.scored_mask_backward.default, (e, u, mask[:3]))
    turns = drawn(5, 8, seed=5), drawn(5, 8, seed=6)
    check(torch.ops.atp.rope.default, (drawn(5, 32, seed=7), *turns, 2, 1))
    q, k = drawn(5, 2, 8, seed=8), drawn(5, 1, 8, seed=9)
    check(torch.ops.atp.rope_backward.default, (q, k, k, *turns))
    check(proximal_step, ([drawn(4, 2, 2, seed=10)], [torch.ones(4, device=DEVICE) > 0], 0.1))
