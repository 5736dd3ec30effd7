"""Runs as objects: what `atp-edge` does on the command line, from Python."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

from atp_export.runtime import Generator, Sampling
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp_edge.config import Config
from atp_edge.model.checkpoint import load_narrow, save_narrow
from atp_edge.model.narrow import narrow_model, narrow_peft
from atp_edge.model.plan import Plan, read_plan
from atp_edge.pipeline.fit import begun_settings
from atp_edge.pipeline.foresee import foresee
from atp_edge.pipeline.stages import run_stages
from atp_edge.pipeline.verdict import Verdict, verdict_of
from atp_edge.run.folder import RunFolder
from atp_edge.run.progress import Logged, Progress
from atp_edge.run.records import STAGES, StageName
from atp_edge.settings import configured, keys, values_of, with_values
from atp_edge.training.decision_learner import DecisionLearner

__all__ = [
    "Config",
    "DecisionLearner",
    "Generator",
    "Plan",
    "Run",
    "Sampling",
    "Verdict",
    "load",
    "narrow",
    "read_plan",
    "save",
]


class Run:
    """A run's folder. Every method does its stage and those before it that are not done yet.

    Raises what the command line ends with: ValueError and OSError for bad input,
    FloatingPointError where training diverges, NotProvenError where the export is not its model.

    said: the settings that stay as they are, by default all; others are chosen to fit the device's
    memory. What does not fit is refused before any work.
    """

    def __init__(
        self,
        config: Config,
        progress: Progress | None = None,
        *,
        said: Collection[str] | None = None,
    ) -> None:
        self.config = config
        self.said = frozenset(values_of(config) if said is None else said)
        self.folder = RunFolder(Path(config.out))
        self.progress = progress or Logged()

    @classmethod
    def open(cls, path: str | Path, *, progress: Progress | None = None, **settings: Any) -> Self:
        """A run that is there, or a new one; nothing is written yet.

        settings: those of the command line; `lora_rank` of `--lora-rank` is `lora__rank`, as the
        section and the key of the TOML file.
        """
        names = {key.parameter: key.name for key in keys()}
        given = {names.get(name, name): value for name, value in settings.items()}
        given["out"] = str(path)
        there = RunFolder(Path(path))
        if there.config_toml.exists():
            config = there.config()
            config = begun_settings(with_values(config, given), given, there)
        else:
            config = configured(given)
        return cls(config, progress, said=given)

    def train(self) -> Self:
        """LoRA and the decision: plan.json, dense/ and, where it is worth it, adapter/."""
        return self._until("train")

    def shrink(self) -> Self:
        """slim/."""
        return self._until("shrink")

    def export(self, *, precision: str | None = None, flavour: str | None = None) -> Path:
        """onnx/, in this form or the run's; returns the folder. Nothing is trained again."""
        asked = {"export.precision": precision, "export.flavour": flavour}
        given = {name: value for name, value in asked.items() if value is not None}
        self.config = with_values(self.config, given)
        found: Path = self._until("export").folder.onnx
        return found

    def verify(self) -> Self:
        """The proof that onnx/ is its model. Raises NotProvenError where it is not."""
        return self._until("verify")

    def bench(self) -> Self:
        """Latency and memory, dense and slim in turn."""
        return self._until("bench")

    def report(self) -> Path:
        """All of it; returns report.html."""
        return self._until("report").folder.path / "report.html"

    @property
    def metrics(self) -> dict[str, Any]:
        """Every figure so far."""
        return self.folder.metrics()

    @property
    def verdict(self) -> Verdict:
        """Against the untouched and the tuned model, what was gained, whether it is proven."""
        return verdict_of(self.metrics, self.folder.stale())

    @property
    def plan(self) -> Plan:
        """What stays. Raises OSError before training."""
        return read_plan(self.folder.plan)

    def generator(self) -> Generator:
        """onnx/ as text in, text out. Raises ValueError where domain.npz beside it is another."""
        self.folder.require_profile()
        return Generator(self.folder.onnx)

    def _until(self, last: StageName) -> Self:
        names = STAGES[: STAGES.index(last) + 1]
        foreseen = foresee(self.config, self.said, names)
        foreseen.refuse()
        for line in filter(None, (foreseen.chosen, *foreseen.warnings())):
            self.progress.say(line)
        self.config = foreseen.config
        run_stages(self.config, names, self.progress)
        return self


def narrow(model: PreTrainedModel | PeftModel, plan: Plan) -> PreTrainedModel | PeftModel:
    """A narrow copy of a dense model, with its LoRA where it has one; the model stays as it is."""
    return narrow_peft(model, plan) if isinstance(model, PeftModel) else narrow_model(model, plan)


def load(folder: str | Path) -> PreTrainedModel:
    """A checkpoint of either widths policy, such as slim/, in fp32."""
    return load_narrow(Path(folder))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """A checkpoint of either widths policy, whole or not at all; per-layer widths bring their
    modelling file."""
    save_narrow(model, tokenizer, Path(folder))
