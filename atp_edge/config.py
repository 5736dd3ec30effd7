"""One frozen dataclass tree for a whole run, and the recipes under it (see atp_edge.settings)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# Of a run that does not say how often it saves.
CHECKPOINTS = 40
FEWEST_STEPS_SAVED = 50

StructureSpace = Literal["groups", "head-dims"]
WidthsPolicy = Literal["uniform", "per-layer"]
Flavour = Literal["ort", "standard", "portable"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Quantizer = Literal["nearest", "k-quant", "gptq"]
GateProfile = Literal["default", "clinical", "legal"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How documents become token blocks."""

    block_tokens: int = field(default=512, metadata={"help": "tokens of a block", "least": 2})
    decision_share: float = field(default=0.1, metadata={"help": "documents the decision sees"})
    test_share: float = field(default=0.1, metadata={"help": "documents kept for the test"})
    test_blocks: int = field(
        default=40, metadata={"help": "blocks of the test, spread over its split", "least": 1}
    )
    train_documents: int = field(
        default=0, metadata={"help": "documents of the train split, at most; 0: all"}
    )
    special_tokens: Literal["text", "parse"] = field(
        default="text",
        metadata={"help": "special-token text in data: text, or the tokens (rows rendered before)"},
    )
    skip_bad_lines: bool = field(
        default=False, metadata={"help": "leave bad rows out and count them"}
    )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """peft's LoRA on every projection of the decoder."""

    rank: int = field(default=16, metadata={"help": "rank of A and B", "least": 1})
    alpha: float = field(default=32.0, metadata={"help": "scale s = alpha / rank", "above": 0})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate", "above": 0})


@dataclass(frozen=True, kw_only=True)
class DecisionConfig:
    """How the pruning decision is learned."""

    start: Literal[
        "importance",
        "all-kept",
        "magnitude",
        "group-taylor",
        "wanda-sp",
        "flap",
        "torch-pruning",
    ] = field(default="importance", metadata={"help": "where the generator starts"})
    space: StructureSpace = field(
        default="groups",
        metadata={"help": "attention loses whole KV groups, or RoPE pairs of all its heads"},
    )
    learn: bool = field(default=True, metadata={"help": "off: frozen at its start"})
    follow: bool = field(
        default=True, metadata={"help": "go on measuring importance; off: at the start alone"}
    )
    control_share: float = field(
        default=0.4, metadata={"help": "share of the steps before the freeze", "most": 1}
    )
    interval: int = field(default=2, metadata={"help": "LoRA steps per generator step", "least": 1})
    lr: float = field(default=1e-3, metadata={"help": "learning rate of the generator"})
    temperature: float = field(default=0.4, metadata={"help": "of the soft decision", "above": 0})
    noise: float = field(default=0.0, metadata={"help": "scale of the Gumbel noise; 0: none"})
    projection: bool = field(default=True, metadata={"help": "off: the penalty alone steers"})
    penalty: float = field(default=5.0, metadata={"help": "weight of the budget penalty"})
    placement: Literal["base", "whole"] = field(
        default="base", metadata={"help": "mask in LoRA steps; base: LoRA-aware"}
    )
    regularizer: Literal["proximal", "lasso", "none"] = field(
        default="proximal", metadata={"help": "on the LoRA of removed structures"}
    )
    strength: float = field(default=10.0, metadata={"help": "of the regularizer at the freeze"})
    width_multiple: int = field(
        default=32, metadata={"help": "MLP widths are multiples of it", "least": 1}
    )
    protect_share: float = field(
        default=0.5,
        metadata={"help": "of the decision's loss that is of --protect; less than 1", "most": 1},
    )
    importance_blocks: int = field(
        default=16, metadata={"help": "blocks that score a start", "least": 1}
    )


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """What happens to the narrow model after the freeze."""

    reconstruct_blocks: int = field(
        default=16, metadata={"help": "blocks of the least-squares repair; 0: none"}
    )
    reconstruct_along: bool = field(
        default=True, metadata={"help": "repair again whenever the decision moves"}
    )
    approach_blocks: int = field(
        default=64,
        metadata={"help": "blocks of the closed-form step to the dense tuned layers; 0: none"},
    )
    adapter: Literal["lora", "ranks", "dora"] = field(
        default="lora",
        metadata={"help": "lora: goes on; begun anew, ranks: more where more was cut, or dora"},
    )
    retrain: bool = field(default=True, metadata={"help": "tune the kept weights beside LoRA"})
    retrain_lr: float = field(
        default=3e-4,
        metadata={
            "help": "peak learning rate of kept weights; larger models want less",
            "above": 0,
        },
    )
    distill: float = field(
        default=0.5, metadata={"help": "weight of the dense tuned teacher", "most": 1}
    )
    distill_hidden: float = field(
        default=6.0, metadata={"help": "weight of the distance to the teacher's layers"}
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    batch_blocks: int = field(default=1, metadata={"help": "blocks a step", "least": 1})
    micro_blocks: int = field(
        default=0, metadata={"help": "of them through the model at once; 0: all"}
    )
    precision: Literal["auto", "bf16", "fp16", "no"] = field(
        default="auto",
        metadata={"help": "autocast; no: fp32; auto: bf16, fp32 on a CPU that has no bf16"},
    )
    base_dtype: Literal["auto", "fp32", "bf16", "nf4"] = field(
        default="auto",
        metadata={
            "help": "projections that are not tuned; auto: bf16 where that loses nothing of them"
        },
    )
    checkpointing: Literal["auto", "true", "false"] = field(
        default="auto",
        metadata={"help": "compute activations again in backward passes; auto: where memory asks"},
    )
    shard: bool = field(
        default=False,
        metadata={"help": "share out frozen weights over the ranks (FSDP2); LoRA alone is tuned"},
    )
    moments: Literal["fp32", "8bit"] = field(
        default="fp32", metadata={"help": "Adam's, of kept weights; 8bit: bitsandbytes'"}
    )
    warmup: float = field(default=0.05, metadata={"help": "share of the steps", "most": 1})
    clip: float = field(default=1.0, metadata={"help": "largest gradient norm", "above": 0})
    save_every: int = field(
        default=0,
        metadata={"help": "steps between checkpoints; 0: a fortieth of the run, 50 at least"},
    )
    patience: float = field(
        default=0.5,
        metadata={
            "help": "share of a phase without a better step that ends it; 0: none",
            "most": 1,
        },
    )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What ships."""

    flavour: Flavour = field(
        default="ort",
        metadata={"help": "ONNX Runtime's fused operators, ai.onnx alone, or its old opsets"},
    )
    precision: Precision = field(default="fp32", metadata={"help": "weights in the ONNX file"})
    quantizer: Literal["auto", Quantizer] = field(
        default="auto",
        metadata={
            "help": "how int8 and int4 round; gptq: calibrated on the train split; "
            "auto: gptq for int4, nearest for int8"
        },
    )
    keep_adapter: bool = field(
        default=False, metadata={"help": "keep LoRA as a narrow peft adapter in slim/"}
    )
    context: int = field(
        default=0, metadata={"help": "longest context; 0: the model's own, 8192 at most"}
    )


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Latency and memory."""

    prompt_tokens: int = field(default=128, metadata={"help": "tokens of the prompt", "least": 1})
    new_tokens: int = field(default=64, metadata={"help": "tokens generated", "least": 1})
    batch: int = field(default=1, metadata={"help": "rows decoded together", "least": 1})
    rounds: int = field(default=5, metadata={"help": "rounds, models in turn", "least": 1})
    threads: int = field(default=0, metadata={"help": "CPU threads; 0: one a core"})


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Ship or do not ship."""

    profile: GateProfile = field(
        default="default", metadata={"help": "thresholds; see docs/gate.md"}
    )
    config: str = field(default="", metadata={"help": "TOML of thresholds, over the profile's"})


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    model: str = field(default="demo", metadata={"help": "folder or hub id; demo: SmolLM2-135M"})
    data: str = field(default="legal", metadata={"help": "file, folder, legal or health"})
    budget: str = field(
        default="params=0.6", metadata={"help": "params=0.6, model-params=0.7 or bytes=300MB"}
    )
    canaries: int = field(
        default=0,
        metadata={"help": "made-up secrets planted in the train split; the gate looks for them"},
    )
    protect: str = field(
        default="", metadata={"help": "text that must not lose: as --data; the decision keeps it"}
    )
    widths: WidthsPolicy = field(
        default="per-layer", metadata={"help": "uniform: an ordinary checkpoint"}
    )
    steps: int = field(default=200, metadata={"help": "optimizer steps", "least": 1})
    seed: int = field(default=0, metadata={"help": "of everything drawn", "most": 2**32 - 1})
    out: str = field(default="runs/run", metadata={"help": "the run's folder"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that the model's folder brings"}
    )
    recipe: Literal["fast", "balanced", "best"] = field(
        default="balanced", metadata={"help": "settings under yours: see docs/recovery.md"}
    )
    dataset: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    decision: DecisionConfig = DecisionConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    train: TrainConfig = TrainConfig()
    export: ExportConfig = ExportConfig()
    bench: BenchConfig = BenchConfig()
    gate: GateConfig = GateConfig()

    @property
    def control_steps(self) -> int:
        """Steps before the freeze; the rest is recovery."""
        return round(self.steps * self.decision.control_share)

    @property
    def train_blocks(self) -> int:
        """Blocks that the steps read, those read again counted again."""
        return self.steps * self.train.batch_blocks

    @property
    def train_tokens(self) -> int:
        """Tokens of `train_blocks`."""
        return self.train_blocks * self.dataset.block_tokens

    @property
    def save_every(self) -> int:
        """Steps between checkpoints; each takes seconds, so a long run has no more of them."""
        return self.train.save_every or max(FEWEST_STEPS_SAVED, self.steps // CHECKPOINTS)

    @property
    def repairs_along(self) -> bool:
        """Whether the repair has a moving decision to follow."""
        repaired = self.recovery.reconstruct_blocks > 0
        return repaired and self.recovery.reconstruct_along and self.decision.learn


# What a recipe changes of the defaults; what it costs and buys is in docs/recovery.md.
RECIPES: dict[str, dict[str, Any]] = {
    "fast": {"recovery.distill": 0.0, "recovery.approach_blocks": 0, "decision.interval": 4},
    "balanced": {},
    # Nothing else that was tried buys as much.
    "best": {"steps": 1600},
}
# Chosen where memory asks: a tie with tuning the kept weights, as measured (docs/recovery.md).
LORA_ALONE: dict[str, Any] = {"recovery.retrain": False, "lora.rank": 64, "lora.alpha": 128.0}
