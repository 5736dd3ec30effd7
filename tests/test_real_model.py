"""The invariants on SmolLM2-135M-Instruct and licence texts: dense, masked, narrow, ONNX, GGUF."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from atp_export.export import export_onnx
from atp_export.gguf.llama_cpp import node_folder
from atp_export.gguf.proof import prove_gguf
from atp_export.gguf.write import write_gguf
from atp_export.quantization.calibrate import BESIDE, input_grams
from atp_export.quantization.quantize import quantize
from atp_export.verification.verify import verify
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from atp_edge.config import Quantizer
from atp_edge.data.reader import read_corpus
from atp_edge.data.splits import Splits, make_splits
from atp_edge.decision.budget import feasible_decisions, parse_budget
from atp_edge.decision.importance import starting_logits, taylor_importance
from atp_edge.decision.projection import project
from atp_edge.evaluation.text_loss import perplexity
from atp_edge.losses import language_loss
from atp_edge.masking.apply import set_decision
from atp_edge.masking.lora import add_lora
from atp_edge.model.checkpoint import load_narrow, save_narrow
from atp_edge.model.families import ATTENTION_PROJECTIONS, model_shape
from atp_edge.model.narrow import merge, narrow_peft
from atp_edge.model.plan import Plan, plan_of, shares
from atp_edge.reconstruction.repair import Repair
from tests.atp_export.gguf.cut_models import CHECKS
from tests.atp_export.quantization.test_quantize import values

pytestmark = pytest.mark.real
WIDTHS = ("uniform", "per-layer")


@pytest.fixture(scope="module")
def tokenizer(real_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(real_folder)


@pytest.fixture(scope="module")
def splits(tokenizer: Any) -> Splits:
    documents = read_corpus("legal", tokenizer).documents[:60]
    return make_splits(documents, tokenizer, block_tokens=256, seed=0)


@pytest.fixture(scope="module")
def dense(real_folder: Path) -> PeftModel:
    """The real model with a LoRA whose factors are both away from zero."""
    model = AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32).eval()
    tuned = add_lora(model, rank=8, alpha=16.0, seed=0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 2e-3)
    return tuned.eval()


Decide = Callable[[str], tuple[Plan, list[Tensor]]]


@pytest.fixture(scope="module")
def decide(dense: PeftModel, splits: Splits) -> Decide:
    """The decision at 60 % of the decoder by importance, for a widths policy."""
    shape = model_shape(dense.get_base_model().config)
    scores: dict[str, list[Tensor]] = {}

    def decided(widths: str) -> tuple[Plan, list[Tensor]]:
        feasible = feasible_decisions(
            shape,
            parse_budget("params=0.6"),
            widths=widths,
            width_multiple=32,  # type: ignore[arg-type]
        )
        if not scores:
            sample = splits.train.first(1)
            with torch.enable_grad():
                scores["once"] = taylor_importance(
                    dense, sample, feasible, lambda b: language_loss(dense, b)
                )
        masks = project(starting_logits(scores["once"], feasible), feasible).masks
        return plan_of(shape, [tuple(m.nonzero().squeeze(1).tolist()) for m in masks]), masks

    return decided


@pytest.mark.parametrize("widths", WIDTHS)
@torch.no_grad()
def test_masked_equals_narrow_and_the_budget_is_met(
    dense: PeftModel, decide: Decide, splits: Splits, widths: str
) -> None:
    plan, masks = decide(widths)
    ids = splits.test.input_ids[:2, :128]
    set_decision(dense, [mask.float() for mask in masks], "whole")
    expected = dense(input_ids=ids).logits
    set_decision(dense, None, "whole")
    narrow = narrow_peft(dense, plan)
    torch.testing.assert_close(narrow(input_ids=ids).logits, expected, atol=2e-3, rtol=0)
    merged = merge(narrow)
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=2e-3, rtol=0)
    assert (dense(input_ids=ids).logits - expected).abs().max() > 1, "the decision changes nothing"
    kept = shares(model_shape(dense.get_base_model().config), model_shape(merged.config))
    step = 1 / (30 * 1536) * 32 * 30  # one width multiple a layer, when all layers are alike
    assert 0.6 - (step if widths == "uniform" else 1e-3) <= kept.decoder <= 0.6


@pytest.fixture(scope="module")
def repaired(
    dense: PeftModel,
    decide: Decide,
    splits: Splits,
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of the slim model with widths that differ by layer, repaired."""
    plan, masks = decide("per-layer")
    model = copy.deepcopy(dense)
    Repair(model, masks, splits.train.first(4), follows=False)
    folder = tmp_path_factory.mktemp("repaired") / "slim"
    save_narrow(merge(narrow_peft(model, plan)), tokenizer, folder)
    return folder


def test_the_repaired_slim_model_is_better_and_its_onnx_equal_on_twenty_prompts(
    dense: PeftModel,
    decide: Decide,
    splits: Splits,
    tokenizer: Any,
    repaired: Path,
    tmp_path: Path,
) -> None:
    cut = merge(narrow_peft(dense, decide("per-layer")[0]))
    slim, test = load_narrow(repaired), splits.test.first(2)
    assert perplexity(slim, test) < 0.7 * perplexity(cut, test)
    export_onnx(repaired, tmp_path / "onnx")
    prompts = tokenizer.batch_decode(splits.test.input_ids[:20, :32])
    report = verify(tmp_path / "onnx", slim, tokenizer, prompts, new_tokens=24)
    assert report.passed, report
    # Logits up to 40. Where both computations' rounding adds up to more than the tolerance, ONNX's
    # own distance to float64 was measured, and is what is bounded.
    own = report.rounding
    assert (own.onnx if own else report.logits_max_error) <= 3e-4
    assert report.logits_mean_error <= 2e-5
    assert report.greedy_same == report.greedy_total == 20


def test_llama_cpp_gives_the_repaired_slim_model_s_tokens(
    splits: Splits, tokenizer: Any, repaired: Path, tmp_path: Path
) -> None:
    """Or, where two are about as good by fp16, the other one; and its perplexity."""
    if (node := node_folder()) is None:
        pytest.skip("node-llama-cpp is not installed: `make test` does where npm is at hand")
    file = write_gguf(repaired, tmp_path / "gguf", precision="f16")
    proof = prove_gguf(
        repaired, file, "f16", tokenizer,
        prompts=tokenizer.batch_decode(splits.test.input_ids[:8, :32]),
        blocks=splits.test.input_ids[:2], node=node, new_tokens=24,
    )  # fmt: skip
    assert proof.failures == []
    assert {check.name for check in proof.checks} == CHECKS
    assert proof.greedy_total == 8


def test_the_uniform_slim_model_talks_in_a_process_without_atp_edge(
    dense: PeftModel, decide: Decide, tokenizer: Any, tmp_path: Path
) -> None:
    plan, _ = decide("uniform")
    slim = merge(narrow_peft(dense, plan))
    save_narrow(slim, tokenizer, tmp_path)
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})
ids = tokenizer("Permission is hereby granted", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist())
print(sum(p.numel() for p in model.parameters()))
assert not any(m.startswith("atp_") for m in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    ids = tokenizer("Permission is hereby granted", return_tensors="pt").input_ids
    expected = slim.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
    assert done[-2] == str(expected)
    assert int(done[-1]) == sum(p.numel() for p in slim.parameters())


@torch.no_grad()
def test_gptq_takes_most_of_what_int4_costs_though_one_token_is_a_hundred_times_the_others(
    real_folder: Path, splits: Splits
) -> None:
    """On attention, whose grams that token would rule; of a third of the layers. By the divergence
    from the exact model's next tokens: what a loss moves by has more noise (a token counted like
    the others, gptq costs 1.1 times what nearest does)."""
    model = load_narrow(real_folder)
    modules = {
        name: module
        for name, module in model.named_modules()
        if name.endswith(ATTENTION_PROJECTIONS) and int(name.split(".")[2]) % 3 == 0
    }
    exact = {name: module.weight.clone() for name, module in modules.items()}
    with torch.enable_grad():
        grams = input_grams(real_folder, splits.train.spread(3).input_ids)

    def next_tokens() -> list[Tensor]:
        blocks = splits.test.spread(2).input_ids
        return [model(input_ids=block[None]).logits.log_softmax(-1) for block in blocks]

    before = next_tokens()

    def cost(quantizer: Quantizer) -> float:
        for name, module in modules.items():
            parent, _, own = name.rpartition(".")
            gram = grams[f"{parent}.{BESIDE.get(own, own)}"]
            blocks = quantize(exact[name].T, 4, quantizer, gram)
            module.weight.copy_(torch.from_numpy(values(blocks)).T)
        lost = [was.exp() * (was - now) for was, now in zip(before, next_tokens(), strict=True)]
        return float(torch.stack(lost).sum(-1).mean())

    assert 0 < cost("gptq") < 0.5 * cost("nearest")
