"""One frozen dataclass tree for a whole run: TOML in, TOML out, every key a flag."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

# Of a run that does not say how often it saves.
CHECKPOINTS = 40
FEWEST_STEPS_SAVED = 50

StructureSpace = Literal["groups", "head-dims"]
WidthsPolicy = Literal["uniform", "per-layer"]
Flavour = Literal["ort", "standard", "portable"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Quantizer = Literal["nearest", "k-quant", "gptq"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How documents become token blocks."""

    block_tokens: int = field(default=512, metadata={"help": "tokens of a block", "least": 2})
    decision_share: float = field(default=0.1, metadata={"help": "documents the decision sees"})
    test_share: float = field(default=0.1, metadata={"help": "documents kept for the test"})
    test_blocks: int = field(
        default=40, metadata={"help": "blocks of the test, spread over its split", "least": 1}
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
    precision: Literal["bf16", "fp16", "no"] = field(
        default="bf16", metadata={"help": "autocast; no: fp32"}
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
class Config:
    """A whole run."""

    model: str = field(default="demo", metadata={"help": "folder or hub id; demo: SmolLM2-135M"})
    data: str = field(default="legal", metadata={"help": "file, legal or health"})
    budget: str = field(
        default="params=0.6", metadata={"help": "params=0.6, model-params=0.7 or bytes=300MB"}
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


@dataclass(frozen=True, kw_only=True)
class Key:
    """One setting: its dotted name, type, default, help, and the bounds of a number.

    least, most: the smallest and the largest value; above: a value that it must pass.
    """

    name: str
    type: Any
    default: Any
    help: str
    least: int = 0
    above: int | None = None
    most: int | None = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace(".", "-").replace("_", "-")

    @property
    def parameter(self) -> str:
        return self.name.replace(".", "__")


def keys(cls: type = Config, prefix: str = "") -> Iterator[Key]:
    """Every setting of the tree, depth first."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            yield from keys(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield Key(
                name=prefix + f.name,
                type=hints[f.name],
                default=f.default,
                **f.metadata,
            )


_KEYS = {key.name: key for key in keys()}


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy with dotted keys set and nothing else: a recipe's settings come by `configured`.

    Raises ValueError for unknown keys and wrong values.
    """
    for name, value in values.items():
        if name not in _KEYS:
            nearest = difflib.get_close_matches(name, _KEYS, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown setting {name!r}; the nearest known one is {nearest!r}")
        checked = _check(_KEYS[name], value)
        section, _, leaf = name.rpartition(".")
        if section:
            changed = replace(getattr(config, section), **{leaf: checked})
            config = replace(config, **{section: changed})
        else:
            config = replace(config, **{leaf: checked})
    return config


def configured(values: Mapping[str, Any]) -> Config:
    """A configuration from dotted keys alone: the defaults, the recipe's settings, these values.

    Raises ValueError for unknown keys and wrong values.
    """
    named = with_values(Config(), {"recipe": values.get("recipe", Config.recipe)})
    return with_values(named, RECIPES[named.recipe] | dict(values))


def _check(key: Key, value: Any) -> Any:
    if get_origin(key.type) is Literal:
        if value not in get_args(key.type):
            raise ValueError(
                f"{key.name} = {value!r}: expected one of {', '.join(get_args(key.type))}"
            )
        return value
    if key.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, key.type) or (key.type is int and isinstance(value, bool)):
        raise ValueError(f"{key.name} = {value!r}: expected {key.type.__name__}")
    if key.type in (int, float) and not _in_bounds(key, value):
        raise ValueError(f"{key.name} = {value!r}: expected {_bounds(key)}")
    return value


def _in_bounds(key: Key, value: float) -> bool:
    """Whether a number is finite and within the key's bounds."""
    low = value >= key.least if key.above is None else value > key.above
    return math.isfinite(value) and low and (key.most is None or value <= key.most)


def _bounds(key: Key) -> str:
    low = f"{key.least} or more" if key.above is None else f"more than {key.above}"
    return low if key.most is None else f"{low}, {key.most} at most"


def read_config(path: Path) -> Config:
    """Read a TOML file. Raises ValueError for unknown keys and wrong values."""
    return configured(read_values(path))


def read_values(path: Path) -> dict[str, Any]:
    """The settings that a TOML file names, by dotted key.

    Raises ValueError naming the file when it is no TOML, for unknown keys and for wrong values.
    """
    tables = _tables(path)
    tables.pop("versions", None)
    values: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, dict):
            values |= {f"{name}.{leaf}": inner for leaf, inner in value.items()}
        else:
            values[name] = value
    try:
        with_values(Config(), values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return values


def read_versions(path: Path) -> dict[str, str]:
    """What ran, as the file says under [versions]. Raises ValueError when it is no TOML."""
    versions: dict[str, str] = _tables(path).get("versions", {})
    return versions


def _tables(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected a TOML configuration") from None
    except ValueError as error:  # of TOML or of UTF-8
        raise ValueError(f"{path} is not TOML: {error}") from None


def values_of(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key."""
    return {key.name: attrgetter(key.name)(config) for key in keys()}


def to_toml(config: Config, versions: Mapping[str, str] | None = None) -> str:
    """The whole tree as TOML, defaults included; what ran is said under [versions]."""
    tables: dict[str, Any] = {}
    for name, value in values_of(config).items():
        section, _, leaf = name.rpartition(".")
        (tables.setdefault(section, {}) if section else tables)[leaf] = value
    if versions:
        tables["versions"] = dict(versions)
    return tomli_w.dumps(tables)
