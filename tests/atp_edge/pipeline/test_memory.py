"""What a run takes, and the settings that fit a device: arithmetic held to what torch keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from atp_edge.api import Run
from atp_edge.config import Config
from atp_edge.data.blocks import Blocks
from atp_edge.losses import language_loss
from atp_edge.masking.apply import set_decision
from atp_edge.masking.lora import add_lora
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import build_model
from atp_edge.model.structures import Masks, sites_of
from atp_edge.pipeline.cost_estimate import sized_model
from atp_edge.pipeline.device import Device, device_of, parse_size
from atp_edge.pipeline.fit import (
    begun_settings,
    begun_with,
    crowded,
    done_here,
    fitted,
    left_for_later,
    refuse,
)
from atp_edge.pipeline.memory import needs_of
from atp_edge.pipeline.memory_need import Need
from atp_edge.pipeline.memory_terms import activations
from atp_edge.pipeline.scale import CARDS, device_of_card, model_of, page
from atp_edge.run.folder import RunFolder, open_run
from atp_edge.run.precision import settled
from atp_edge.settings import configured, values_of, with_values
from atp_edge.training.cpu import attention_implementation
from atp_edge.training.frozen import check_base, check_shards
from tests.test_docs import ROOT

TOKENS = 256


def kept_a_layer(kind: str, precision: str) -> float:
    """Bytes that autograd keeps of a layer, for a token: of three layers over one."""

    def kept(layers: int) -> int:
        config = LlamaConfig(
            vocab_size=64, hidden_size=128, intermediate_size=512, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        base = build_model(config, torch.float32).eval().requires_grad_(False)
        base.set_attn_implementation(attention_implementation("cpu"))
        for name, module in base.named_modules():
            if name.endswith("_proj") and precision == "bf16":
                module.to(torch.bfloat16)
        model = add_lora(base, rank=4, alpha=8.0, seed=0)
        if kind != "dense":
            masks = Masks(
                torch.ones(s.size, dtype=torch.bool) for s in sites_of(model_shape(config))
            )
            given = masks if kind == "lora" else Masks(m.float().requires_grad_() for m in masks)
            set_decision(model, given, "base" if kind == "lora" else "whole")
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found: dict[int, Tensor] = {}

        def pack(x: Tensor) -> Tensor:
            if x.untyped_storage().data_ptr() not in own and TOKENS in x.shape:
                found[x.untyped_storage().data_ptr()] = x
            return x

        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
        ):
            language_loss(model, Blocks(input_ids=ids, labels=ids))
        return sum(x.untyped_storage().nbytes() for x in found.values())

    return (kept(3) - kept(1)) / 2 / TOKENS


@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize("kind", ["dense", "lora", "generator"])
def test_activations_are_counted_as_autograd_keeps_them(kind: Any, precision: str) -> None:
    given = {"dataset.block_tokens": TOKENS, "recovery.retrain": False}
    config = with_values(Config(), given | {"train.precision": precision})
    shape = model_shape(
        LlamaConfig(
            vocab_size=64, hidden_size=128, intermediate_size=512, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    counted = activations(config, shape, kind) / TOKENS
    assert counted == pytest.approx(kept_a_layer(kind, precision), rel=0.1)


def most(needs: list[Need], kind: str = "device_bytes") -> float:
    return max(getattr(need, kind) for need in needs)


def test_8b_fits_60_gigabytes_at_4096_tokens_and_70b_is_cut_in_16_of_the_host() -> None:
    asked, model = model_of("8B (Llama 3)")
    assert asked.train.batch_blocks * asked.dataset.block_tokens == 4096
    config, chosen = fitted(asked, model, (), device_of_card(CARDS[2]))
    assert chosen
    assert most(needs_of(config, model, "cuda")) <= 60e9
    config, model = model_of("70B (Llama 3)")
    after = [n for n in needs_of(config, model, "cuda") if n.part in ("freeze", "shrink", "export")]
    assert len(after) == 3
    assert most(after, "host_bytes") <= 16e9


def test_what_is_said_stays_and_what_does_not_fit_is_refused_with_what_does() -> None:
    asked, model = model_of("8B (Llama 3)")
    device = device_of_card(CARDS[2])
    said = ("recovery.retrain", "lora.rank")
    config, chosen = fitted(asked, model, said, device)
    assert chosen is None
    assert config == with_values(asked, {"train.precision": "bf16"})
    with pytest.raises(ValueError, match="--no-recovery-retrain") as refused:
        refuse(config, model, device)
    assert "joint steps takes" in str(refused.value)
    small = device_of_card(CARDS[0])
    with pytest.raises(ValueError, match="no settings known here fit"):
        refuse(asked, model, small)


@pytest.mark.parametrize(
    "named",
    [
        {"recovery.retrain": True},
        {"recovery.reconstruct_blocks": 16},
        {"recovery.adapter": "ranks"},
        {"decision.space": "head-dims"},
        {"train.checkpointing": "false"},
        {"train.precision": "no"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", ["24GB", "80GB", "8x24GB", "8x80GB"])
def test_what_is_chosen_goes_with_what_was_said(
    named: dict[str, Any], size: str, tmp_path: Path
) -> None:
    """Else the run would begin, and its own config.toml be refused when it is gone on with."""
    asked, model = model_of("8B (Llama 3)")
    asked, device = with_values(asked, named), device_of(size, tmp_path)
    config, chosen = fitted(asked, model, (*named,), device)
    assert values_of(config).items() >= named.items() or chosen is None
    check_base(config)
    check_shards(config)


def test_a_run_that_has_begun_is_not_changed_to_fit_another_device(tmp_path: Path) -> None:
    """What only another run can change is not chosen, and advised for a new folder; what may change
    is chosen as ever."""
    asked, model = model_of("8B (Llama 3)")
    run = RunFolder(tmp_path)
    assert begun_with(asked, run) == frozenset()
    begun = begun_with(asked, open_run(with_values(asked, {"out": str(tmp_path)})))
    assert {"recovery.retrain", "lora.rank", "train.precision"} <= begun
    assert begun.isdisjoint({"train.checkpointing", "train.shard"})
    small, large = device_of_card(CARDS[2]), device_of_card(CARDS[3])
    _, chosen = fitted(asked, model, begun, small)
    assert chosen is None
    with pytest.raises(ValueError, match=r"take .*--no-recovery-retrain .* and a new --out: this"):
        refuse(settled(asked, "cuda"), model, small, begun)
    eight_bit = with_values(asked, {"train.moments": "8bit", "train.checkpointing": "auto"})
    found, chosen = fitted(eight_bit, model, begun, large)
    assert chosen
    assert found.train.checkpointing == "true"


def test_a_run_that_has_begun_keeps_what_auto_was(tmp_path: Path) -> None:
    """On a GPU bf16, say; on a CPU without bf16 it would be fp32, which is another run."""
    run = open_run(configured({"out": str(tmp_path), "train.precision": "bf16"}))
    auto = configured({"out": str(tmp_path), "train.precision": "auto"})
    assert begun_settings(auto, {"train.precision"}, run).train.precision == "bf16"
    said = with_values(auto, {"train.precision": "no"})
    assert begun_settings(said, {"train.precision"}, run) == said
    opened = Run.open(tmp_path, train__precision="auto", steps=3)
    assert (opened.config.train.precision, opened.config.steps) == ("bf16", 3)


def test_a_run_that_has_begun_may_share_out_its_weights(tmp_path: Path) -> None:
    """Then checkpointing, which that needs and it had not, is chosen again."""
    values = {"out": str(tmp_path), "train.checkpointing": "false"}
    run, shared = open_run(configured(values)), configured({"train.shard": True})
    assert begun_settings(Config(), (), run).train.checkpointing == "false"
    assert begun_settings(shared, {"train.shard"}, run).train.checkpointing == "auto"


def test_a_disk_that_holds_each_part_and_not_all_of_them_is_named() -> None:
    config, device = Config(), Device(
        kind="cpu", name="this CPU", memory=16e9, host=16e9, disk=100e9, quantizes=False
    )  # fmt: skip
    model = sized_model(config)
    all_of_it = sum(need.disk_bytes for need in needs_of(config, model, "cpu"))
    with pytest.raises(ValueError, match=r"this run: all of it takes .* GB of the disk;"):
        refuse(config, model, replace(device, disk=0.9 * all_of_it))


def test_a_gate_that_does_not_fit_is_told_and_refuses_nothing() -> None:
    asked, model = model_of("8B (Llama 3)")
    device = device_of_card(CARDS[1])
    config, _ = fitted(asked, model, (), device)
    needs = needs_of(config, model, "cuda")
    refuse(config, model, device)
    assert left_for_later(needs, device) is None
    small = replace(device, memory=40e9)
    assert (left_for_later(needs, small) or "").startswith("gate takes 4")


def test_a_gate_short_of_fp32_holds_the_dense_model_as_it_is_stored() -> None:
    asked, model = model_of("8B (Llama 3)")

    def done(card: int, stored: torch.dtype) -> Mapping[str, float]:
        needs = needs_of(asked, replace(model, stored=stored), "cuda")
        return done_here(device_of_card(CARDS[card]), needs[-1]).device

    in_fp32 = done(2, torch.bfloat16)["dense model, in fp32"]
    assert in_fp32 == 2 * done(1, torch.bfloat16)["dense model, as stored"]
    assert done(1, torch.float32)["dense model, in fp32"] == in_fp32


def test_a_small_model_keeps_its_settings() -> None:
    config = configured({"train.precision": "bf16"})
    device = Device(
        kind="cpu", name="this CPU", memory=16e9, host=16e9, disk=100e9, quantizes=False
    )
    found, chosen = fitted(config, sized_model(config), (), device)
    assert chosen is None
    assert found == with_values(config, {"train.checkpointing": "false"})


def test_sizes_of_devices(tmp_path: Path) -> None:
    assert parse_size("24GB") == 24e9
    assert parse_size("1.5 GiB") == 1.5 * 2**30
    for wrong in ("24", "0GB", "GB", "-1GB", "24 Gb"):
        with pytest.raises(ValueError, match="expected a size such as"):
            parse_size(wrong)
    eight = device_of("8x 80GB", tmp_path)
    assert (eight.name, eight.count) == ("each of 8 GPUs of 80GB", 8)
    elsewhere = device_of("80GB", tmp_path / "not" / "there")
    assert (elsewhere.kind, elsewhere.memory, elsewhere.host) == ("cuda", 80e9, math.inf)


def test_the_page_on_real_sizes_is_what_the_estimate_says() -> None:
    assert (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").startswith(page())


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "paper").glob("*.toml")), ids=str)
def test_the_papers_runs_are_checked_on_shapes_alone(path: Path) -> None:
    from atp_edge.pipeline.preflight import check_run
    from atp_edge.run.records import STAGES
    from atp_edge.settings import configured, read_values

    values = read_values(path)
    values["model"] = str(ROOT / values["model"])
    config = configured(values)
    check_run(config, STAGES, weights=False)
    model = sized_model(config)
    found, _ = fitted(config, model, frozenset(values), device_of_card(CARDS[2]))
    refuse(found, model, device_of_card(CARDS[2]))
    sizes = json.loads((Path(config.model) / "config.json").read_text())
    assert sizes["hidden_size"] == model.dense.hidden == 4096


def test_memory_that_other_programs_hold_is_told_before_any_work() -> None:
    config = configured({"model": "demo"})
    needs = needs_of(config, sized_model(config), "cpu")
    most = max(need.device_bytes for need in needs)
    here = Device(
        kind="cpu", name="this CPU", memory=2 * most, host=2 * most, disk=1e12, quantizes=False
    )
    assert crowded(needs, here) is None
    said = crowded(needs, replace(here, free=0.5 * most))
    assert said is not None
    assert f"{0.5 * most / 1e9:.1f} of the {2 * most / 1e9:.1f} GB of this CPU are free now" in said


def test_what_a_run_that_has_begun_holds_is_room_for_it(tmp_path: Path) -> None:
    empty = device_of(None, tmp_path / "run").disk
    (tmp_path / "run" / "dense").mkdir(parents=True)
    with (tmp_path / "run" / "dense" / "model.safetensors").open("wb") as file:
        file.truncate(10**12)  # A sparse file: it takes no room.
    assert device_of(None, tmp_path / "run").disk < empty + 0.1e12, "it may be anyone's"
    (tmp_path / "run" / "config.toml").touch()
    assert device_of(None, tmp_path / "run").disk > empty + 0.9e12
