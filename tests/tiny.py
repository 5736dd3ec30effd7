"""Tiny random models of every family, with the plans, masks and runs that tests make of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GraniteConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
    SmolLM3Config,
)

from atp_edge.config import Config, StructureSpace
from atp_edge.data.blocks import Blocks
from atp_edge.data.domains import demo_model_folder, legal_texts
from atp_edge.decision.budget import FeasibleDecisions, feasible_decisions, parse_budget
from atp_edge.masking.lora import add_lora, lora_layer
from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.families import FAMILIES as RECORDS
from atp_edge.model.families import Layout, model_shape
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

_NO_TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, Any] = {
    "llama": (LlamaConfig, {}),
    "llama-biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
}

_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 2.5, 3.0, 4.0],
    "long_factor": [2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 9.0],
}
_LLAMA4 = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_NTK_ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}
NEW_FAMILIES: dict[str, Any] = {
    "gemma3": (
        Gemma3TextConfig,
        {"layer_types": _TYPES, "sliding_window": 5, "query_pre_attn_scalar": 24},
    ),
    "gemma2": (
        Gemma2Config,
        {"layer_types": _TYPES, "sliding_window": 5, "query_pre_attn_scalar": 24}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "phi3": (Phi3Config, {"sliding_window": 7}),
    "phi4-mini": (
        Phi3Config,
        {"hidden_size": 192, "head_dim": 32, "rope_parameters": _LONGROPE}
        | {"original_max_position_embeddings": 192},
    ),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0, 1]}),
    "olmo2": (Olmo2Config, {}),
    "olmo3": (Olmo3Config, {"layer_types": _TYPES, "sliding_window": 5}),
    "granite": (
        GraniteConfig,
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 1.7}
        | {"attention_multiplier": 0.3, "mlp_bias": True},
    ),
    "glm4": (Glm4Config, {"head_dim": 32, "rms_norm_eps": 1e-6}),
    "exaone4": (Exaone4Config, {"layer_types": _TYPES, "sliding_window": 5}),
    "seed-oss": (SeedOssConfig, {"attention_out_bias": True}),
    "ernie4_5": (Ernie4_5Config, {"use_bias": True}),
    "hunyuan": (
        HunYuanDenseV1Config,
        {"rope_parameters": _NTK_ALPHA},
    ),
    "ministral": (MinistralConfig, {"layer_types": _TYPES, "sliding_window": 5}),
    "ministral3": (Ministral3Config, {"rope_parameters": _LLAMA4}),
}
"""Families that are what the first ones are not, one line each."""


def tiny_model(family: str, *, tied: bool = False, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A random model whose every parameter (biases and norms too) is away from its default."""
    config_class, extra = (FAMILIES | NEW_FAMILIES)[family]
    config = config_class(**(SIZES | _NO_TOKENS | extra | sizes), tie_word_embeddings=tied)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    layout = RECORDS[config.model_type].layout
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.15
            size = _norm_size(name, layout)
            parameter.copy_(torch.randn_like(parameter) * scale * (size or 1) + size)
            if size:
                parameter.sub_(layout.norm_offset)
    return model


QUICK_GATE = str(Path(__file__).with_name("quick_gate.toml"))


def _norm_size(name: str, layout: Layout) -> float:
    """Of a norm's factors, about; 0 for all that is no norm. What enters the stream through a norm
    is small beside it, as in trained models."""
    after = (layout.norms.after_attention, layout.norms.after_mlp)
    return 0.2 if name.split(".")[-2] in after else float("norm" in name)


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


def save_tiny_source(folder: Path) -> None:
    """model/, a tiny Llama, and data.jsonl, licence texts for it. Its tokenizer is the demo model's
    with 1,024 tokens: with its own 49,152 nearly all that a tiny model costs is its embedding."""
    texts = [text[:1000] for text, _ in legal_texts()[:120]]
    demo = AutoTokenizer.from_pretrained(demo_model_folder())
    tokenizer = demo.train_new_from_iterator(texts, 1024)
    model = tiny_model("llama", tied=True, vocab_size=len(tokenizer))
    save_narrow(model, tokenizer, folder / "model")
    save_texts(folder / "data.jsonl", texts)


def save_texts(path: Path, texts: Iterable[str]) -> None:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))


def dense_run(folder: Path, real_folder: Path, **settings: Any) -> RunFolder:
    """A run of an untrained tiny model on licence texts, with its dense checkpoint alone."""
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    save_texts(folder / "data.jsonl", (text[:2500] for text, _ in legal_texts()[:120]))
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
        structures=lora_layer(model, 0, "o_proj").space,
    )


def random_masks(feasible: FeasibleDecisions, seed: int = 0) -> Masks:
    draw = torch.Generator().manual_seed(seed)
    masks = [torch.rand(s.size, generator=draw) < 0.5 for s in feasible.sites]
    for mask in masks:
        mask[0] = True
    return Masks(masks)
