"""The LoRA step under a fixed decision against the all-kept one, on a real model, in one run.

A ratio is the median over rounds of the ratio within a round, with its quartiles. None is given
unless every gradient equals masking's. `atp-edge bench training --json FILE` writes the figures
(bench/results/training-cpu.json).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from atp_bench.clock import now
from atp_bench.interleaved_timing import interleaved_timing
from atp_bench.learned_widths import learned_masks
from atp_bench.paired import paired_ratio
from atp_bench.run_steps import bench_run_steps
from atp_edge.data.blocks import Blocks
from atp_edge.decision.budget import feasible_decisions, parse_budget
from atp_edge.decision.projection import project
from atp_edge.decision.regularizer import proximal_step
from atp_edge.losses import language_loss
from atp_edge.masking.apply import set_decision
from atp_edge.masking.lora import add_lora
from atp_edge.model.families import check_reads, longest_text, model_shape
from atp_edge.model.loading import load_config
from atp_edge.model.structures import Masks
from atp_edge.run.environment import environment
from atp_edge.run.freed_memory import keep_freed_memory
from atp_edge.training.cpu import attention_implementation

Precision = Literal["fp32", "bf16"]
# A gradient is a sum over tokens in another order: fp32's rounding, not more.
LARGEST_ERROR = 1e-3
LEARNED = "kept alone, a learned plan's widths"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A decision to be timed, LoRA-aware (placement `base`).

    lora: what is left of the LoRA of removed structures.
    """

    name: str
    masks: Masks
    skip: bool = True
    lora: Literal["zero", "not zero"] = "zero"


@dataclass(frozen=True, kw_only=True)
class TrainingBench:
    """The model with LoRA away from zero, one batch, and the decision to compare with all kept."""

    model: PeftModel
    batch: Blocks
    decision: Masks
    kept_share: float
    learned: Masks | None
    """Of the widths of a learned plan, where the model has one."""

    def variants(self) -> list[Variant]:
        """All kept first: the others are divided by it."""
        every = Masks(torch.ones_like(mask) for mask in self.decision)
        found = [
            Variant(name="all kept", masks=every),
            Variant(name="kept alone", masks=self.decision),
            Variant(name="kept, LoRA of removed not zero", masks=self.decision, lora="not zero"),
            Variant(name="masked, not skipped", masks=self.decision, skip=False),
        ]
        more = [] if self.learned is None else [Variant(name=LEARNED, masks=self.learned)]
        return found + more


def make_bench(folder: str, *, kept: float, tokens: int, rank: int, device: str) -> TrainingBench:
    """A per-layer decision of random scores that keeps `kept` of the decoder's parameters. Raises
    ValueError for more tokens than the model reads."""
    longest = longest_text(load_config(Path(folder)))
    check_reads(longest, tokens, f"--tokens {tokens}", "take fewer")
    if device == "cpu":
        keep_freed_memory()
    dense = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=attention_implementation(device),
        trust_remote_code=False,
    ).to(device)
    shape = model_shape(dense.config)
    feasible = feasible_decisions(
        shape, parse_budget(f"params={kept}"), widths="per-layer", width_multiple=32
    )
    draw = torch.Generator().manual_seed(0)
    scores = [torch.randn(site.size, generator=draw) for site in feasible.sites]
    masks = project(scores, feasible).masks
    learned = learned_masks(feasible.sites, kept)
    ids = torch.randint(0, shape.vocabulary, (1, tokens), generator=draw)
    model = add_lora(dense, rank=rank, alpha=2.0 * rank, seed=0).to(device)
    return TrainingBench(
        model=model,
        batch=Blocks(input_ids=ids, labels=ids).to(device),
        decision=Masks(mask.to(device) for mask in masks),
        kept_share=float(feasible.kept_share([mask.float() for mask in masks])),
        learned=None if learned is None else Masks(mask.to(device) for mask in learned),
    )


def apply_variant(made: TrainingBench, variant: Variant) -> None:
    """The variant's decision on the model; B drawn anew, zero where a removed one is to be zero."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.01)
            if "lora_A" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    if variant.lora == "zero":
        # As at the end of control: the proximal step has reached exact zero.
        proximal_step(made.model, variant.masks, 1e6)
    set_decision(made.model, variant.masks, "base", skip=variant.skip)


def gradients(made: TrainingBench) -> dict[str, Tensor]:
    """The gradient of every LoRA factor, in fp32."""
    parameters = {n: p for n, p in made.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(language_loss(made.model, made.batch), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def largest_error(made: TrainingBench, variant: Variant) -> float:
    """The largest relative difference of a factor's gradient from that of multiplied masks."""
    apply_variant(made, variant)
    ours = gradients(made)
    masks = [mask.float() for mask in variant.masks]
    set_decision(made.model, masks, "base", skip=False)
    errors = [
        float((ours[name] - want).norm() / want.norm().clamp_min(1e-20))
        for name, want in gradients(made).items()
    ]
    return max(errors)


def decoder_step(made: TrainingBench) -> float:
    """Seconds of forward and backward through the layers, from a gradient of ones."""
    decoder: Any = made.model.get_base_model().model
    began = now()
    hidden = decoder(input_ids=made.batch.input_ids, use_cache=False).last_hidden_state
    hidden.backward(torch.ones_like(hidden))
    return _finish(made, began)


def lora_step(made: TrainingBench) -> float:
    """Seconds of forward and backward, loss included (the optimizer is the same for all)."""
    began = now()
    language_loss(made.model, made.batch).backward()
    return _finish(made, began)


def _finish(made: TrainingBench, began: float) -> float:
    seconds = now() - began
    for parameter in made.model.parameters():
        parameter.grad = None
    return seconds


STEPS: dict[str, Callable[[TrainingBench], float]] = {
    "decoder_step": decoder_step,
    "lora_step": lora_step,
}


def timed_steps(
    made: TrainingBench, rounds: int, precision: Precision
) -> dict[str, dict[str, Any]]:
    """Medians in milliseconds and ratios to all kept with their quartiles, by variant."""

    def once(variant: Variant) -> dict[str, float]:
        apply_variant(made, variant)
        device = made.batch.input_ids.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            return {name: step(made) for name, step in STEPS.items()}

    found = interleaved_timing({v.name: partial(once, v) for v in made.variants()}, rounds)
    first = next(iter(found.values()))
    return {
        name: {key: figure for step in STEPS for key, figure in _figures(step, each, first).items()}
        for name, each in found.items()
    }


def _figures(
    step: str, times: list[dict[str, float]], reference: list[dict[str, float]]
) -> dict[str, Any]:
    seconds = [one[step] for one in times]
    ratio = paired_ratio(seconds, [one[step] for one in reference])
    return {
        f"{step}_ms": statistics.median(seconds) * 1e3,
        f"{step}_ratio": ratio.median,
        f"{step}_ratio_quartiles": ratio.quartiles,
    }


def bench_training(
    folder: str,
    *,
    kept: float,
    tokens: int,
    rank: int,
    rounds: int,
    precisions: tuple[Precision, ...],
    device: str,
    run_rounds: int = 0,
) -> dict[str, Any]:
    """The figures of `atp-edge bench training`.

    The two ratios at the top are those of "kept alone" in the first precision: LoRA-aware masks,
    the LoRA of removed structures exactly zero, which is the state the proximal step reaches.
    None where a gradient differs. `*_learned` are the same of a learned plan's widths, for the
    model and share that one is known of. run_rounds: of the steps of a run, over the dense one
    (run_steps.py). Raises ValueError for settings out of range.
    """
    if not 0 < kept <= 1 or tokens < 2 or rounds < 1 or rank < 1 or not precisions:
        raise ValueError(
            f"kept {kept}, tokens {tokens}, rounds {rounds}, rank {rank}, precisions {precisions}: "
            "expected 0 < kept <= 1, 2 tokens or more, 1 round or more, a rank and a precision"
        )
    made = make_bench(folder, kept=kept, tokens=tokens, rank=rank, device=device)
    errors = {
        v.name: largest_error(made, v) for v in made.variants() if v.skip and v.name != "all kept"
    }
    equal = all(error <= LARGEST_ERROR for error in errors.values())
    rows = {precision: timed_steps(made, rounds, precision) for precision in precisions}
    percent = round(100 * kept)
    named = {"": "kept alone"} | ({} if made.learned is None else {"_learned": LEARNED})
    ratios = {
        f"{step}_ratio_{percent}{suffix}": rows[precisions[0]][name][f"{step}_ratio"]
        if equal
        else None
        for suffix, name in named.items()
        for step in STEPS
    }
    decision, share = made.learned or made.decision, made.kept_share
    del made
    own = {} if not run_rounds else bench_run_steps(
        folder, kept=kept, tokens=tokens, rounds=run_rounds, precision=precisions[-1],
        decision=decision,
    )  # fmt: skip
    return ratios | {
        "gradients_equal": equal,
        "largest_gradient_error": errors,
        "kept_share": share,
        "rows": rows,
        "run_steps": own,
        "settings": {"tokens": tokens, "rank": rank, "rounds": rounds, "device": device,
                     "precision_of_the_ratios": precisions[0],
                     "threads": torch.get_num_threads()},
        "environment": environment(),
    }  # fmt: skip


def steps_table(precision: str, rows: dict[str, Any], *, equal: bool) -> Table:
    """A row a variant of the LoRA step; ratios only where the gradients are equal."""
    shown = Table(
        title=f"LoRA step, {precision}: ms, over all kept, and the quartiles of that",
        title_justify="left",
    )
    shown.add_column("variant", overflow="fold")
    for name in ("layers", "ratio", "quartiles", "step", "ratio", "quartiles"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name, row in rows.items():
        shown.add_row(
            name, *_cells(row, "decoder_step", equal=equal), *_cells(row, "lora_step", equal=equal)
        )
    return shown


def _cells(row: dict[str, Any], step: str, *, equal: bool) -> tuple[str, str, str]:
    ms = f"{row[f'{step}_ms']:.0f}"
    if not equal:
        return ms, "-", "-"
    low, high = row[f"{step}_ratio_quartiles"]
    return ms, f"{row[f'{step}_ratio']:.2f}", f"{low:.2f}-{high:.2f}"
