"""The training core on Triton; test_triton_blocks.py runs it.

float64 takes the torch path wherever it runs: the same model in float64 is the oracle.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from atp_kernels import backend_name
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from atp_edge.decision.budget import feasible_decisions, parse_budget
from atp_edge.decision.importance import scored
from atp_edge.masking import triton_blocks as fused
from atp_edge.masking.apply import set_decision
from atp_edge.masking.compact_site import CompactSite
from atp_edge.masking.lora import lora_layer
from atp_edge.masking.triton_blocks import FusedQkv
from atp_edge.model.families import model_shape
from tests.atp_edge.masking import test_compact_site
from tests.atp_edge.masking.test_compact_site import gradients
from tests.tiny import FAMILIES
from tests.triton_process import DEVICE

LAYERS = 3
IDS = test_compact_site.IDS.to(DEVICE)
DECISION, PAIR_DECISION = (
    [mask.to(DEVICE) for mask in masks]
    for masks in (test_compact_site.DECISION, test_compact_site.PAIR_DECISION)
)
GEMM, SWIGLU = torch.ops.atp.masked_gemm.default, torch.ops.atp.masked_swiglu.default


def lora_model(*args: Any, **kwargs: Any) -> PeftModel:
    model: PeftModel = test_compact_site.lora_model(*args, **kwargs).to(DEVICE)
    return model


def decision(kind: str, masks: list[Tensor] = DECISION) -> list[Tensor]:
    """fixed: bool; float: between 0 and 1, and to be learned."""
    if kind == "fixed":
        return masks
    draw = torch.Generator().manual_seed(3)
    return [torch.rand(len(m), generator=draw).to(DEVICE).requires_grad_() for m in masks]


def all_gradients(model: PeftModel, masks: list[Tensor], placement: Any) -> dict[str, Tensor]:
    """The loss, and the gradient of every LoRA factor, trained weight and float mask."""
    set_decision(model, masks, placement)
    for mask in masks:
        mask.grad = None
    learned = {f"mask {i}": mask for i, mask in enumerate(masks) if mask.requires_grad}
    found = gradients(model, learned)
    assert all(value.isfinite().all() for value in found.values())
    return found


def near(ours: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Within fp32's rounding of each one's largest value."""
    for name, exact in want.items():
        error = float((ours[name].double() - exact.double()).abs().max())
        scale = float(exact.abs().max())
        assert error <= 1e-5 * max(scale, 1e-2), f"{name}: {error} of {scale}"


def test_triton_is_what_runs() -> None:
    assert backend_name() == "triton"


def cells() -> Iterator[Any]:
    """Of every family both placements and both kinds; the other half of the products is large."""
    for i, family in enumerate(FAMILIES):
        for (j, placement), (k, kind) in itertools.product(
            enumerate(("base", "whole")), enumerate(("fixed", "float"))
        ):
            marks = [pytest.mark.large] if (i + j + k) % 2 else []
            yield pytest.param(family, placement, kind, marks=marks)


@pytest.mark.parametrize(("family", "placement", "kind"), cells())
def test_loss_and_every_gradient_equal_the_torch_path(
    family: str, placement: str, kind: str
) -> None:
    model = lora_model(family)
    ours = all_gradients(model, decision(kind), placement)
    assert isinstance(lora_layer(model, 0, "q_proj").site, FusedQkv)
    want = all_gradients(model.double(), decision(kind), placement)
    site = lora_layer(model, 0, "q_proj").site
    assert isinstance(site, CompactSite) if kind == "fixed" else site is None
    near(ours, want)


@pytest.mark.parametrize("placement", ["base", "whole"])
@pytest.mark.parametrize("kind", ["fixed", "float"])
def test_rope_pairs_are_masked_projection_by_projection(placement: str, kind: str) -> None:
    masks = decision(kind, PAIR_DECISION)
    model = lora_model("qwen2", space="head-dims")
    ours = all_gradients(model, masks, placement)
    assert all(lora_layer(model, 0, name).site is None for name in ("q_proj", "k_proj", "v_proj"))
    near(ours, all_gradients(model.double(), masks, placement))


@pytest.mark.parametrize("retrain", [False, True])
def test_all_kept_none_kept_and_weights_that_are_trained_too(retrain: bool) -> None:
    for share in (True, False):
        masks = [torch.full_like(mask, share) for mask in DECISION]
        for placement in ("base", "whole"):
            model = lora_model("qwen2", retrain=retrain)
            ours = all_gradients(model, masks, placement)
            want = all_gradients(model.double(), masks, placement)
            near(ours, want)


class Watch(TorchDispatchMode):
    """Counts operators, and fails on those that read a value back to the host.

    All that can be seen of it without a GPU: the shapes of these operators' results, or the
    numbers that Python gets from them, depend on values.
    """

    READ_BACK = frozenset({
        "_local_scalar_dense", "item", "nonzero", "nonzero_static", "masked_select", "equal",
        "is_nonzero", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    })  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        assert name not in self.READ_BACK, f"{name} reads a value back to the host"
        listed = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in _indices(name, args))
        assert not listed, "an index of bools reads its count back to the host"
        self.calls[func] += 1
        if func is GEMM:
            # Opaque to the mode otherwise: what the operator itself does is looked at too.
            from atp_kernels.masked_gemm_triton import masked_gemm

            with self:
                return masked_gemm(*args)
        return func(*args, **(kwargs or {}))


def _indices(name: str, args: Any) -> Any:
    return args[1] if name in ("index", "index_put", "index_put_") else ()


def decoder_step(model: PeftModel) -> None:
    """Forward and backward of the layers. Around them transformers reads back whether sequences
    are packed, and the loss which tokens are labelled."""
    decoder = model.get_base_model().model
    hidden = decoder.embed_tokens(IDS)
    positions = torch.arange(IDS.shape[1], device=DEVICE)[None]
    embeddings = decoder.rotary_emb(hidden, position_ids=positions)
    for layer in decoder.layers:
        hidden = layer(hidden, position_embeddings=embeddings, position_ids=positions)
    hidden.backward(torch.ones_like(hidden))


@pytest.mark.parametrize("placement", ["base", "whole"])
@pytest.mark.parametrize("kind", ["fixed", "float"])
def test_a_step_reads_nothing_back_and_runs_the_fused_operators(placement: str, kind: str) -> None:
    model, masks = lora_model("qwen3"), decision(kind)
    decoder_step(model)
    with Watch() as watch:
        set_decision(model, masks, placement)
        decoder_step(model)
    # A layer's forward: q, k, v at once, o, gate, up, down; the gradient of x through each of them
    # once more, but for the first layer's q, k, v. Float masks on outputs: one more for each.
    # On the whole, numbers stand on what o and down read; SwiGLU puts the latter's: o is masked.
    products = 2 * 5 * LAYERS - 1
    expected = {("float", "base"): products + 3 * LAYERS, ("float", "whole"): 2 * LAYERS}
    assert watch.calls[GEMM] == expected.get((kind, placement), products)
    assert watch.calls[SWIGLU] == LAYERS


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("placement", ["base", "whole"])
@pytest.mark.parametrize("kind", ["fixed", "float"])
def test_a_step_is_replayed_from_a_cuda_graph(placement: str, kind: str) -> None:
    model, masks = lora_model("qwen3"), decision(kind)
    learned = [p for p in (*model.parameters(), *masks) if p.requires_grad]

    def step() -> None:
        set_decision(model, masks, placement)
        decoder_step(model)

    def taken() -> list[Tensor]:
        return [p.grad.clone() for p in learned if p.grad is not None]

    with torch.cuda.stream(torch.cuda.Stream()):  # Triton compiles, cuBLAS takes its memory.
        step()
    torch.cuda.synchronize()
    want = taken()
    set_decision(model, None, placement)  # What hangs on a mask belongs to the stream it came from.
    for p in learned:
        p.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(2):
        for p in learned:
            if p.grad is not None:
                p.grad.fill_(torch.nan)  # Captured gradients are written, not added to.
        graph.replay()
        for ours, eager in zip(taken(), want, strict=True):
            torch.testing.assert_close(ours, eager)


def test_the_watch_sees_what_reads_back() -> None:
    mask = torch.tensor([True, False])
    for reads in (
        mask.any().item,
        mask.nonzero,
        lambda: torch.ones(2)[mask],
        lambda: bool(mask[0]),
    ):
        with pytest.raises(AssertionError, match="to the host"), Watch():
            reads()


def test_stacked_weights_stand_from_decision_to_decision_and_fall_with_a_weight() -> None:
    model = lora_model("qwen2")

    def stacked() -> Tensor:
        all_gradients(model, decision("float"), "whole")
        all_gradients(model, DECISION, "base")
        site = lora_layer(model, 0, "k_proj").site
        assert isinstance(site, FusedQkv)
        return site.stacked._made["weight"][1]

    first = stacked()
    assert stacked() is first
    with torch.no_grad():
        lora_layer(model, 0, "k_proj").get_base_layer().weight *= 2
    assert not torch.equal(stacked(), first)


def test_what_the_operators_do_not_cover_is_computed_apart_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another activation, other scalings in one block, LoRA switched off: right all the same."""
    fused.log_fallback_once.cache_clear()
    model = lora_model("qwen2")
    layers = model.get_base_model().model.layers
    layers[0].mlp.act_fn = nn.GELU()
    lora_layer(model, 1, "up_proj").scaling["default"] = 0.25
    lora_layer(model, 2, "k_proj").scaling["default"] = 0.25
    found = []
    with caplog.at_level(logging.WARNING):
        for kind in (torch.float32, torch.float64):
            for masks in (DECISION, decision("float")):
                # CompactSite takes one scaling a site: its oracle is multiplied masks.
                masks = [m.detach().double() for m in masks] if kind == torch.float64 else masks
                found.append(all_gradients(model.to(kind), masks, "whole"))
    for ours, want in ((found[0], found[2]), (found[1], found[3])):
        near(ours, want)
    for said in ("activation is GELU", "gate, up and down differ", "q, k and v differ"):
        assert caplog.text.count(said) == 1


def test_hooks_on_down_proj_still_see_what_it_reads() -> None:
    """`scored`, which a generator step may run under, gives the scores of the torch path."""
    model = lora_model()
    shape = model_shape(model.get_base_model().config)
    feasible = feasible_decisions(
        shape, parse_budget("params=0.5"), widths="per-layer", width_multiple=1
    )
    scores = []
    for kind in (torch.float32, torch.float64):
        with scored(model.to(kind), feasible) as seen:
            all_gradients(model, decision("float"), "whole")
        scores.append(seen)
    for ours, want in zip(*scores, strict=True):
        assert want.all()
        torch.testing.assert_close(ours, want, atol=1e-5, rtol=1e-3)


def test_a_merged_or_unloaded_model_is_computed_as_transformers_does() -> None:
    model = lora_model()
    set_decision(model, DECISION, "whole")
    masked = model(input_ids=IDS).logits
    for unloaded in (
        copy.deepcopy(model).merge_and_unload(),
        copy.deepcopy(model).unload(),
    ):
        plain = type(unloaded)(unloaded.config).to(DEVICE)
        plain.load_state_dict(unloaded.state_dict())
        torch.testing.assert_close(unloaded(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    torch.testing.assert_close(copy.deepcopy(model)(input_ids=IDS).logits, masked)
    with model.disable_adapter():
        off = model(input_ids=IDS).logits
    torch.testing.assert_close(off, copy.deepcopy(model).unload()(input_ids=IDS).logits)
