"""What a run takes is asked of the device before any work, on the command line and from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atp_edge.api import Run
from atp_edge.config import Config
from atp_edge.pipeline import foresee as module
from atp_edge.pipeline.cost_estimate import sized_model
from atp_edge.pipeline.device import USABLE, Device
from atp_edge.pipeline.foresee import foresee
from atp_edge.pipeline.memory import needs_of
from atp_edge.pipeline.stages import done_by
from atp_edge.run.folder import open_run
from atp_edge.run.records import STAGES, StageName
from atp_edge.settings import configured, with_values
from tests.atp_edge.test_api import DATA, SETTINGS
from tests.sources import save_source
from tests.tiny_tokenizers import tokenizer_of

LARGE = {"dataset.block_tokens": 64, "train.batch_blocks": 4096}
"""A step that checkpointing makes far smaller."""


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    save_source(tmp_path / "model", tokenizer=tokenizer_of("byte-level", bos=False))
    own = {key.replace("__", "."): value for key, value in SETTINGS.items()}
    return own | {"model": str(tmp_path / "model"), "data": str(DATA), "steps": 8,
                  "out": str(tmp_path / "run")}  # fmt: skip


def there_is(memory: float, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(
        kind="cpu", name="this CPU", memory=memory, host=memory, disk=1e12, quantizes=False
    )
    monkeypatch.setattr(module, "device_of", lambda asked, out: device)


def between(config: Config) -> float:
    """Memory that holds a run with checkpointing, and none without it."""
    model = sized_model(config)
    least, most = (
        max(n.device_bytes for n in needs_of(with_values(config, changes), model, "cpu"))
        for changes in ({"train.checkpointing": "true"}, {"train.checkpointing": "false"})
    )
    assert least < 0.9 * most
    return (least + most) / 2 / USABLE


@pytest.mark.parametrize("stage", ["train", "shrink", "export", "verify", "bench", "report"])
def test_a_run_from_python_is_refused_before_any_work(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    there_is(0.5e9, monkeypatch)
    run = Run.open(given["out"], **{k: v for k, v in given.items() if k != "out"})
    with pytest.raises(ValueError, match="this CPU cannot hold this run: dense baseline takes 0"):
        getattr(run, stage)()
    assert not Path(given["out"]).exists()


def test_from_python_too_settings_that_were_not_said_are_chosen(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(given | LARGE)
    there_is(between(config), monkeypatch)
    # A whole configuration says all of them.
    with pytest.raises(ValueError, match=r"take --train-checkpointing true$"):
        Run(config).train()
    opened = Run.open(given["out"], **{k: v for k, v in (given | LARGE).items() if k != "out"})
    found = foresee(opened.config, opened.said, ("train",))
    found.refuse()
    assert (found.chosen or "").endswith("train.checkpointing = true")


def test_what_training_takes_is_not_asked_for_when_it_is_done(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = given | LARGE | {"train.checkpointing": "false"}
    config = configured(said)
    there_is(between(config), monkeypatch)
    run = open_run(config)
    with pytest.raises(ValueError, match="cannot hold this run"):
        foresee(config, said, ("train", "shrink")).refuse()
    run.plan.write_text("{}")
    run.records.keep("train", read={})
    monkeypatch.setattr(module, "what_is_slow", lambda *_: "training is slow here")
    found = foresee(config, said, ("train", "shrink"))
    found.refuse()
    assert [need.part for need in found.needs] == ["shrink"]
    assert "training is slow here" not in found.warnings()
    run.plan.write_text("changed")
    again = foresee(config, said, ("train", "shrink"))
    with pytest.raises(ValueError, match="cannot hold this run: dense baseline takes"):
        again.refuse()
    assert "training is slow here" in again.warnings()
    run.plan.write_text("{}")
    there_is(0.5e9, monkeypatch)
    with pytest.raises(ValueError, match="cannot hold this run: shrink takes"):
        foresee(config, said, ("train", "shrink")).refuse()
    # What is done is not asked for; of a finished run nothing.
    done: tuple[StageName, ...] = ("shrink", "export", "verify", "bench", "gate")
    (run.path / "metrics.json").write_text(json.dumps({name: {} for name in done}))
    for stage in done:
        run.records.keep(stage, read=run.records.reads(stage), settings=done_by(config, stage))
    found = foresee(config, said, STAGES)
    found.refuse()
    assert not found.needs
    assert "take" not in " ".join(found.warnings()), "no part's memory is warned of"
    (run.path / "slim").mkdir()
    (run.path / "slim" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot hold this run: shrink takes"):
        foresee(config, said, ("train", "shrink")).refuse()


@pytest.mark.parametrize(
    ("family", "widths", "said"),
    [("qwen3", "per-layer", True), ("qwen3", "uniform", False), ("llama", "per-layer", False),
     ("gemma3", "per-layer", True)],
)  # fmt: skip
def test_widths_that_no_gguf_file_holds_are_said_before_training(
    given: dict[str, Any], tmp_path: Path, family: str, widths: str, said: bool
) -> None:
    save_source(tmp_path / "other", family, tokenizer=tokenizer_of("byte-level", bos=False))
    config = configured(given | {"model": str(tmp_path / "other"), "widths": widths})
    found = [x for x in foresee(config, (), STAGES).warnings() if "GGUF" in x]
    assert ["--widths uniform" in x for x in found] == [True] * said
