"""Tiny random models of every family, with the plans, masks and runs that tests make of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from atp_edge.config import Config, StructureSpace
from atp_edge.data.blocks import Blocks
from atp_edge.data.domains import legal_texts
from atp_edge.decision.budget import FeasibleDecisions, feasible_decisions, parse_budget
from atp_edge.masking.lora import add_lora, lora_layer
from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.families import model_shape
from atp_edge.model.plan import Plan, plan_of
from atp_edge.model.structures import Masks
from atp_edge.run.folder import RunFolder, open_run
from atp_edge.settings import with_values

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 256,
}

FAMILIES: dict[str, Any] = {
    "llama": (LlamaConfig, {}),
    "llama-biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
}


def tiny_model(family: str, *, tied: bool = False, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A random model whose every parameter (biases and norms too) is away from its default."""
    config_class, extra = FAMILIES[family]
    config = config_class(**(SIZES | sizes), tie_word_embeddings=tied, **extra)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.15
            parameter.copy_(torch.randn_like(parameter) * scale + ("norm" in name))
    return model


QUICK_GATE = str(Path(__file__).with_name("quick_gate.toml"))
QUICK_TO_TRAIN: dict[str, Any] = {
    "dataset.block_tokens": 32,
    "dataset.test_blocks": 2,
    "train.precision": "no",
    "decision.width_multiple": 4,
    "decision.importance_blocks": 2,
    "recovery.reconstruct_blocks": 2,
}


def masks_of(plan: Plan) -> Masks:
    """Fixed masks (bool [size] a site) of a plan."""
    return Masks(site.mask() for site in plan.sites)


class Silent:
    """Progress that only remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def phase(self, *_: Any) -> None: ...
    def record(self, *_: Any) -> None: ...


def dense_run(folder: Path, real_folder: Path, **settings: Any) -> RunFolder:
    """A run of an untrained tiny model on licence texts, with its dense checkpoint alone."""
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    lines = [json.dumps({"text": text[:2500]}) for text, _ in legal_texts()[:120]]
    (folder / "data.jsonl").write_text("\n".join(lines))
    paths = {"model": "run/dense", "data": "data.jsonl", "out": "run"}
    values = {key: str(folder / path) for key, path in paths.items()}
    run = open_run(with_values(Config(), values | settings))
    save_narrow(tiny_model("llama", tied=True, vocab_size=len(tokenizer)), tokenizer, run.dense)
    return run


def record(run: RunFolder, *stages: str) -> None:
    """Take what lies in a run's folder as what these stages left."""
    for stage in stages:
        run.records.keep(stage, read=run.records.reads(stage))


IDS = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(1))


def uniform_plan(model: PreTrainedModel) -> Plan:
    return plan_of(
        model_shape(model.config), [(0,), (1, 2, 5, 39), (2,), (0, 3, 4, 7), (1,), (6, 8, 9, 10)]
    )


def per_layer_plan(model: PreTrainedModel) -> Plan:
    return plan_of(
        model_shape(model.config),
        [(0, 2), (1, 2, 5, 39), (1,), tuple(range(40)), (0, 1, 2), (7,)],
    )


PLANS = {"uniform": uniform_plan, "per-layer": per_layer_plan}


def uniform_pairs(model: PreTrainedModel) -> Plan:
    """Eight of the 16 RoPE pairs of a head of 32 dimensions, others in every layer."""
    kept = [tuple(range(i, 16, 2)) if i < 2 else (0, 1, 2, 5, 9, 13, 14, 15) for i in range(3)]
    channels = [(1, 2, 5, 39), (0, 3, 4, 7), (6, 8, 9, 10)]
    both = [site for pair in zip(kept, channels, strict=True) for site in pair]
    return plan_of(model_shape(model.config), both, "head-dims")


def per_layer_pairs(model: PreTrainedModel) -> Plan:
    kept = [(0, 2, 3, 5, 7, 11, 13, 15), (1, 2, 5, 39), tuple(range(16)), tuple(range(40))]
    return plan_of(
        model_shape(model.config), [*kept, (1, 2, 3, 4, 8, 12, 14, 15), (7,)], "head-dims"
    )


PAIR_PLANS = {"uniform pairs": uniform_pairs, "per-layer pairs": per_layer_pairs}

PAIR_FAMILIES = [family for family in FAMILIES if family != "qwen3"]

CUTS = [*itertools.product(FAMILIES, PLANS), *itertools.product(PAIR_FAMILIES, PAIR_PLANS)]


def to_cut(family: str, policy: str, *, tied: bool = False) -> tuple[PreTrainedModel, Plan]:
    """A dense model, and a plan of either structure space for it."""
    sizes = {"head_dim": 32} if policy in PAIR_PLANS else {}
    model = tiny_model(family, tied=tied, **sizes)
    return model, (PLANS | PAIR_PLANS)[policy](model)


def with_lora(model: PreTrainedModel, seed: int = 3, space: StructureSpace = "groups") -> PeftModel:
    """LoRA whose both factors are away from zero."""
    peft = add_lora(model, rank=4, alpha=8.0, seed=seed, space=space)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return peft.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


TRAIN_IDS = torch.randint(0, 97, (24, 20), generator=torch.Generator().manual_seed(0))

BLOCKS = Blocks(input_ids=TRAIN_IDS, labels=TRAIN_IDS)

SPACES = ["groups", "head-dims"]


def lora_model(
    family: str = "llama", seed: int = 0, structures: StructureSpace = "groups"
) -> PeftModel:
    # 16 RoPE pairs a head: two steps of `head-dims`.
    sizes = {"head_dim": 32} if structures == "head-dims" else {}
    model = tiny_model(family, seed=seed, **sizes)
    return add_lora(model, rank=4, alpha=8.0, seed=seed, space=structures)


def feasible_of(
    model: PeftModel, share: float = 0.6, widths: str = "per-layer"
) -> FeasibleDecisions:
    shape = model_shape(model.get_base_model().config)
    return feasible_decisions(
        shape,
        parse_budget(f"params={share}"),
        widths=widths,  # type: ignore[arg-type]
        width_multiple=4,
        structures=lora_layer(model, 0, "q_proj").space,
    )


def random_masks(feasible: FeasibleDecisions, seed: int = 0) -> Masks:
    draw = torch.Generator().manual_seed(seed)
    masks = [torch.rand(s.size, generator=draw) < 0.5 for s in feasible.sites]
    for mask in masks:
        mask[0] = True
    return Masks(masks)
