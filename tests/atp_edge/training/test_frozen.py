"""Frozen bases in few bytes, a teacher on the base's own weights, activations computed again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from atp_kernels import dense_weight
from torch import Tensor

from atp_edge.config import Config
from atp_edge.losses import language_loss
from atp_edge.masking.apply import set_decision
from atp_edge.masking.lora import add_lora
from atp_edge.model.checkpoint import load_narrow, save_narrow, streamed_narrow
from atp_edge.model.narrow import narrow_model, narrow_peft
from atp_edge.settings import with_values
from atp_edge.training.checkpointing import checkpointed, enable_checkpointing
from atp_edge.training.frozen import check_base, in_fp32, load_frozen, pruned_kind
from tests.tiny import (
    BLOCKS,
    IDS,
    logits,
    masks_of,
    per_layer_plan,
    tiny_model,
    with_lora,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_a_streamed_model_says_the_same_and_holds_nothing(tied: bool, tmp_path: Path) -> None:
    dense = tiny_model("qwen3", tied=tied)
    save_narrow(narrow_model(dense, per_layer_plan(dense)), None, tmp_path / "slim")
    streamed = streamed_narrow(tmp_path / "slim", CPU)
    # Not bit by bit: where weights lie in memory chooses among a product's kernels.
    whole = load_narrow(tmp_path / "slim")
    torch.testing.assert_close(logits(streamed), logits(whole), rtol=0, atol=1e-5)
    assert all(parameter.is_meta for parameter in streamed.parameters())


def test_a_dense_model_is_taken_apart_as_it_is_cut() -> None:
    plan, model = per_layer_plan(tiny_model("llama")), with_lora(tiny_model("llama", tied=True))
    expected = logits(narrow_peft(model, plan))
    narrow = narrow_peft(model, plan, take=True)
    assert torch.equal(logits(narrow), expected)
    held = {p.untyped_storage().data_ptr() for p in narrow.parameters()}
    left = {p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters() if p.numel()}
    assert sum(size for at, size in left.items() if at not in held) == 0


def test_projections_in_bf16_widen_for_a_pass_in_fp32(tmp_path: Path) -> None:
    save_narrow(tiny_model("llama").to(torch.bfloat16), None, tmp_path / "dense")
    kept = with_lora(load_frozen(tmp_path / "dense", torch.bfloat16, CPU))
    wide = with_lora(load_frozen(tmp_path / "dense", torch.float32, CPU))
    with in_fp32(kept):
        assert torch.equal(logits(kept), logits(wide))
    assert kept.get_base_model().lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("space", ["dense", "decided"])
def test_activations_computed_again_give_the_same_gradients(space: str) -> None:
    def gradients(*, again: bool) -> tuple[dict[str, Tensor], int]:
        model = with_lora(tiny_model("llama"))
        if space == "decided":
            set_decision(model, masks_of(per_layer_plan(model.get_base_model())), "base")
        if again:
            enable_checkpointing(model)
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), checkpointed(model):
            loss = language_loss(model, BLOCKS.first(4))
        size = sum(kept.values())
        loss.backward()
        assert not model.training
        assert not any(module.training for module in model.modules())
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, size

    (plain, whole), (again, little) = gradients(again=False), gradients(again=True)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert little < whole / 2


def test_what_projections_are_kept_in() -> None:
    alone = {"recovery.retrain": False, "train.precision": "bf16"}
    bf16 = torch.bfloat16
    assert pruned_kind(Config(), bf16) == torch.float32
    assert pruned_kind(with_values(Config(), alone), bf16) == bf16
    assert pruned_kind(with_values(Config(), alone), torch.float32) == torch.float32
    asked = with_values(Config(), alone | {"train.base_dtype": "bf16"})
    assert pruned_kind(asked, torch.float32) == bf16
    check_base(asked)
    with pytest.raises(ValueError, match="kept weights are tuned in fp32"):
        check_base(with_values(Config(), {"train.base_dtype": "bf16"}))
    with pytest.raises(ValueError, match="expected bf16"):
        check_base(with_values(asked, {"train.precision": "no"}))


def test_a_base_in_nf4_trains(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs `pip install bitsandbytes` (a CPU will do)")
    # On a CPU bitsandbytes 0.50 rounds three times as badly where a row is no multiple of 64.
    sizes = {"hidden_size": 192, "intermediate_size": 128}
    save_narrow(tiny_model("llama", **sizes).to(torch.bfloat16), None, tmp_path / "dense")
    model = add_lora(load_frozen(tmp_path / "dense", "nf4", CPU), rank=4, alpha=8.0, seed=0)
    plan = per_layer_plan(model.get_base_model())
    rounded = load_narrow(tmp_path / "dense")
    packed = 0
    for name, weight in model.get_base_model().named_parameters():
        if getattr(weight, "quant_state", None) is not None:
            own = rounded.get_parameter(name.replace(".base_layer", ""))
            levels = dense_weight(weight).float()
            assert 0 < float(((levels - own).norm() / own.norm()).detach()) < 0.12  # 4 bits
            own.data, packed = levels, packed + 1
    assert packed == 3 * 5  # q, k, v, gate and up; o and down are moved, and stay in bf16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = language_loss(model, BLOCKS.first(2))
        with torch.no_grad():
            wanted = language_loss(rounded, BLOCKS.first(2))
    assert float(loss.detach()) == pytest.approx(float(wanted), abs=0.01)
    loss.backward()
    with in_fp32(model):
        wide = model(input_ids=IDS).logits
    assert wide.dtype == torch.float32
    up = model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer().weight
    kept = dense_weight(up)[plan.site(0, "mlp").mask()]
    narrow = narrow_peft(model, plan, take=True).get_base_model().model.layers[0].mlp.up_proj
    assert narrow.weight.dtype == torch.bfloat16
    assert torch.equal(narrow.weight, kept)
