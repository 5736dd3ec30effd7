"""The LoRA that a run puts on its models: on the dense one, and begun anew on the narrow one."""

from __future__ import annotations

from peft import PeftModel
from transformers import PreTrainedModel

from atp_edge.config import Config
from atp_edge.masking.lora import add_lora
from atp_edge.model.families import FAMILIES, module_path
from atp_edge.model.plan import Plan


def with_lora(config: Config, model: PreTrainedModel) -> PeftModel:
    """The run's plain LoRA on every projection."""
    return add_lora(
        model,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        seed=config.seed,
        space=config.decision.space,
    )


def add_recovery_adapter(model: PreTrainedModel, config: Config, plan: Plan) -> PeftModel:
    """The LoRA that recovery tunes on a narrow model, as `recovery.adapter` says."""
    lora, ranks = config.lora, None
    if config.recovery.adapter == "ranks":
        ranks = redistributed_ranks(plan, lora.rank)
    return add_lora(
        model,
        rank=lora.rank,
        alpha=lora.alpha,
        seed=config.seed,
        ranks=ranks,
        dora=config.recovery.adapter == "dora",
    )


def redistributed_ranks(plan: Plan, rank: int) -> dict[str, int]:
    """A rank for every projection by its path: in proportion to what its site lost, in the mean
    `rank`, at least a quarter of it."""
    layout = FAMILIES[plan.family].layout
    lost = {(s.layer, s.kind): 1 - s.width / s.size for s in plan.sites}
    mean = sum(lost.values()) / len(lost)
    ranks = {}
    for (layer, kind), share in lost.items():
        wanted = rank if mean == 0 else round(rank * (0.25 + 0.75 * share / mean))
        for projection in layout.attention if kind == "attention" else layout.mlp:
            ranks[module_path(layer, projection)] = max(1, wanted)
    return ranks
