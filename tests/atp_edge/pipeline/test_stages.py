"""What a stage left holds only as long as all that it read and wrote is what it was."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from atp_edge.cli import app, main
from atp_edge.config import Config, GateConfig
from atp_edge.pipeline import export, gate, report, stages, verify
from atp_edge.pipeline.cost_estimate import sized_model
from atp_edge.pipeline.device import device_of
from atp_edge.pipeline.inputs import inputs_of
from atp_edge.pipeline.memory import needs_of
from atp_edge.pipeline.stages import run_stages, taken_up
from atp_edge.run.errors import ConditionNotMetError, Stopped, TakenError
from atp_edge.run.folder import RunFolder, open_run
from atp_edge.run.hashes import combined_sha256, files_sha256
from atp_edge.run.peak_memory import set_back
from atp_edge.run.pinned import inputs_sha256, settings_of
from atp_edge.run.records import FOLDERS, PLAN, STAGES, TUNED, WORK, StageName
from atp_edge.settings import configured
from tests.tiny import QUICK_GATE, QUICK_TO_TRAIN, Silent, save_tiny_source

QUICK = QUICK_TO_TRAIN | {
    "steps": 6, "train.save_every": 2, "bench.rounds": 1, "bench.prompt_tokens": 4,
    "bench.new_tokens": 2, "gate.config": QUICK_GATE,
}  # fmt: skip
# What no stage reads any more, and what is written anew every time.
UNREAD = ("checkpoint/best.pt", "checkpoint/state.pt", "checkpoint/frozen.safetensors",
          "checkpoint/dense_adapter.safetensors",
          "checkpoint/parts.json", "report.html", "memory.json")  # fmt: skip


def settings(source: Path, out: Path, **values: Any) -> Config:
    named = {"model": str(source / "model"), "data": str(source / "data.jsonl"), "out": str(out)}
    return configured(QUICK | named | values)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of few tokens: every test copies the run, and many go through it again."""
    folder = tmp_path_factory.mktemp("source")
    save_tiny_source(folder)
    return folder


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = settings(source, tmp_path_factory.mktemp("runs") / "whole")
    run_stages(config, STAGES, Silent())
    return config


@pytest.fixture
def copied(finished: Config, tmp_path: Path) -> Config:
    """The settings of a copy of the finished run, in another place."""
    shutil.copytree(finished.out, tmp_path / "run")
    return replace(finished, out=str(tmp_path / "run"))


def gone_on(config: Config, names: Sequence[StageName] = STAGES) -> list[str]:
    """What is said as these stages are asked for."""
    progress = Silent()
    run_stages(config, names, progress)
    return progress.said


def done_before(said: list[str]) -> list[str]:
    return [text.removesuffix(": done before") for text in said if text.endswith("done before")]


def alone(name: StageName, config: Config) -> None:
    run = RunFolder(Path(config.out))
    with taken_up(run, Silent(), source=True) as own:
        stages.run_stage(name, own, run, Silent())


def hashes(config: Config) -> dict[str, str]:
    """Of all models of a run."""
    return files_sha256(Path(config.out), [*FOLDERS, TUNED, PLAN])


def test_a_finished_run_is_done_wherever_it_lies(
    copied: Config, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    near = {"model": "link/model", "data": "./link/data.jsonl", "out": "run/"}
    for config in (copied, replace(copied, **near)):
        assert done_before(gone_on(config)) == list(STAGES[:-1])


def test_what_every_part_took_is_noted_by_the_names_of_the_estimate(finished: Config) -> None:
    if not set_back():
        pytest.skip("the kernel keeps no mark of resident memory that can be set back")
    noted = json.loads((Path(finished.out) / "memory.json").read_text())
    said = [need.part for need in needs_of(finished, sized_model(finished), "cpu")]
    assert sorted(noted) == sorted(said)
    assert all(peak["host"] > 1e8 for peak in noted.values())


@pytest.mark.parametrize("seconds", [1.0, 4e9])
def test_a_clock_that_was_wrong_or_is_moved_does_nothing(copied: Config, seconds: float) -> None:
    for path in Path(copied.out).rglob("*"):
        os.utime(path, (seconds, seconds))
    assert done_before(gone_on(copied)) == list(STAGES[:-1])


def test_a_run_goes_on_from_another_directory_than_it_began_in(
    copied: Config, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it names by paths of its first directory, and what an older run says of them."""
    monkeypatch.chdir(source)
    (source / "gate.toml").write_text(Path(QUICK_GATE).read_text())
    near = replace(copied, model="model", data="data.jsonl", gate=GateConfig(config="gate.toml"))
    assert done_before(gone_on(near)) == list(STAGES[:-1])
    monkeypatch.chdir(tmp_path)
    own = RunFolder(Path(copied.out)).config()
    assert done_before(gone_on(own)) == list(STAGES[:-1])
    alone("verify", own)
    with pytest.raises(ValueError, match=f"'model': no folder of that name .* in {tmp_path}, and"):
        gone_on(near)


def test_the_page_shows_no_figure_that_no_longer_holds(copied: Config) -> None:
    page, gate = Path(copied.out) / "report.html", "<h2>The gate: what ships"
    written = page.stat().st_mtime_ns
    with taken_up(RunFolder(Path(copied.out)), Silent(), source=True):
        pass
    assert gate in page.read_text()
    assert page.stat().st_mtime_ns == written
    fp16 = replace(copied, export=replace(copied.export, precision="fp16"))
    gone_on(fp16, STAGES[:3])
    assert gate not in page.read_text()
    assert "Latency and memory" not in page.read_text()
    alone("bench", fp16)
    assert "Latency and memory" in page.read_text()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    """One bit; size and time stay."""
    content, stat = bytearray(file.read_bytes()), file.stat()
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def delete(file: Path) -> None:
    file.unlink()


Fault = Callable[[Path], None]
FAULTS: list[Fault] = [cut, flip, delete]


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_in_a_finished_run_is_made_good_or_named(copied: Config, fault: Fault) -> None:
    """Every file in turn: the stage that is done again says which file, or the error does."""
    folder = Path(copied.out)
    inputs = inputs_of(copied)
    pinned = inputs_sha256(inputs)
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and not f.name.startswith(".")]
    assert len(files) > 40
    kept = {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
    for file in files:
        name, content = str(file.relative_to(folder)), file.read_bytes()
        fault(file)
        try:
            run = open_run(copied, inputs)
            stages._check_history(run)
            found = [run.records.trouble(n, settings_of(copied, n)) for n in STAGES if n in WORK]
            named = " ".join(filter(None, found))
        except ValueError as error:
            named = str(error)
        if name in UNREAD or (fault, name) == (delete, "history.jsonl"):
            assert not named
        elif name in ("config.toml", "inputs.json") and not named:
            # Made again of what is asked for, and of what is there.
            assert RunFolder(folder).config() == copied
            assert inputs_sha256(json.loads((folder / "inputs.json").read_text())) == pinned
        elif (fault, name) == (delete, "stages.json"):
            again = " ".join(["it has not ended"] * 2)
            assert named == again, "proof and gate alone are not taken as they are"
        else:
            assert name in named, (name, named)
        for text, before in kept.items():
            (folder / text).write_bytes(before)
        file.write_bytes(content)
    assert done_before(gone_on(copied)) == list(STAGES[:-1])


@pytest.mark.parametrize(
    ("faults", "again"),
    [
        ({"dense/model.safetensors": flip}, ["train", "tune_dense"]),
        ({"checkpoint/tuned.safetensors": cut, "checkpoint/state.pt": flip}, ["train", "recover"]),
        ({"plan.json": delete, "slim/config.json": cut}, ["train", "learn_decision", "shrink"]),
        ({"onnx/model.onnx.data": flip, "metrics.json": delete}, []),
    ],
)
def test_what_is_damaged_is_made_again_as_it_was(
    copied: Config, faults: dict[str, Fault], again: list[str]
) -> None:
    before = hashes(copied)
    for name, fault in faults.items():
        fault(Path(copied.out) / name)
    said = gone_on(copied)
    assert re.findall(r"^(\w+) (?:again|no longer holds): ", "\n".join(said), re.M) == again
    assert hashes(copied) == before
    assert done_before(gone_on(copied)) == list(STAGES[:-1])


def test_a_stage_alone_names_what_it_cannot_read(copied: Config) -> None:
    run = RunFolder(Path(copied.out))
    flip(run.slim / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"export reads .* slim/model.safetensors changed .*shrink --out"
    ):
        alone("export", copied)
    with pytest.raises(ValueError, match=r"slim is not what shrink wrote: slim/model.safetensors"):
        run.require("dense", "slim")
    assert "export" in run.metrics(), "a refused call changes nothing"
    progress = Silent()
    with taken_up(run, progress, source=False) as own:
        stages.run_stage("report", own, run, progress)
    assert "figures of shrink are of other files" in progress.said[0]
    page = (run.path / "report.html").read_text()
    assert "No longer so: the figures of <code>verify</code>, for slim/model.safetensors" in page


def test_a_gate_that_memory_does_not_hold_ends_before_it_reads_a_model(
    copied: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(device_of(None, Path(copied.out)), memory=1e6)
    monkeypatch.setattr(gate, "device_of", lambda *_: small)
    monkeypatch.setattr(gate, "judge", lambda *_: pytest.fail("a model is read"))
    with pytest.raises(ValueError, match=r"GB of the 0.0 GB .*`atp-edge gate .* larger machine"):
        alone("gate", copied)
    assert done_before(gone_on(copied)) == list(STAGES[:-1]), "the verdict of before stands"


def test_settings_that_training_does_not_read_change_without_training_again(
    copied: Config,
) -> None:
    bench = replace(copied.bench, new_tokens=3)
    assert done_before(gone_on(replace(copied, bench=bench))) == [*STAGES[:4], "gate"]
    smaller = replace(copied, bench=bench, export=replace(copied.export, precision="fp16"))
    run = RunFolder(Path(copied.out))
    proven = run.metrics()["verify"]
    assert done_before(gone_on(smaller, STAGES[:3])) == ["train", "shrink"]
    assert run.metrics().keys() == {"train", "shrink", "export", "samples"}, "proof and bench go"
    assert not any((run.path / name).exists() for name in WORK["gate"].writes), "no verdict stays"
    gone_on(smaller)
    assert run.metrics()["verify"] != proven


@pytest.fixture
def signals() -> Iterator[None]:
    """What `main` sets is put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    shown = sys.unraisablehook
    yield
    sys.unraisablehook = shown
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["atp-edge", *arguments])
    with pytest.raises(SystemExit) as code:
        main()
    return int(code.value.code or 0)


def test_a_proof_that_failed_stays_failed_until_what_failed_is_written_anew(
    copied: Config, monkeypatch: pytest.MonkeyPatch, signals: None
) -> None:
    run = RunFolder(Path(copied.out))
    written = export.export_onnx

    def wrongly(source: Path, target: Path, **rest: Any) -> None:
        written(source, target, **rest)
        with (target / "model.onnx.data").open("r+b") as file:
            file.seek(run.onnx.stat().st_size)
            file.write(bytes(200_000))

    monkeypatch.setattr(export, "export_onnx", wrongly)
    alone("export", copied)
    assert run.metrics().keys() == {"train", "shrink", "export", "samples"}
    monkeypatch.setattr(export, "export_onnx", written)
    command = ["run", "--config", str(run.config_toml)]
    for _ in range(3):
        assert ended(monkeypatch, *command) == 1
        assert "bench" not in run.metrics()
    alone("report", copied)
    assert "FAILED" in (run.path / "report.html").read_text()
    alone("export", copied)
    assert "verify" not in run.metrics()
    assert ended(monkeypatch, *command) == 0


PINNED = ["data.jsonl", "model/config.json", "model/tokenizer.json", "model/model.safetensors",
          "model/chat_template.jinja"]  # fmt: skip


@pytest.mark.parametrize("name", PINNED)
def test_other_input_under_a_run_is_refused_by_name(
    copied: Config, source: Path, tmp_path: Path, name: str
) -> None:
    changed = tmp_path / "source"
    shutil.copytree(source, changed)
    (changed / "data.jsonl").rename(changed / "renamed.jsonl")
    here = {"model": str(changed / "model"), "data": str(changed / "renamed.jsonl")}
    moved = replace(copied, **here)
    assert done_before(gone_on(moved)) == list(STAGES[:-1]), "the same input in another place"
    file = changed / ("renamed.jsonl" if name == "data.jsonl" else name)
    flip(file)
    match = rf"the run began with: {file} changed \(SHA-256 .* then, .* now\); put the old"
    with pytest.raises(ValueError, match=match):
        gone_on(moved)
    for stage in ("shrink", "verify"):
        with pytest.raises(ValueError, match=match):
            alone(stage, moved)  # type: ignore[arg-type]
    (tmp_path / "other.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"another configuration \(data = .* with other content"):
        gone_on(replace(copied, data=str(tmp_path / "other.jsonl")))


def test_a_run_begun_before_there_was_a_setting_goes_on_wherever_it_lies(
    copied: Config, source: Path, tmp_path: Path
) -> None:
    run = RunFolder(Path(copied.out))
    inputs = json.loads(run.inputs_json.read_text())
    del inputs["settings"]["canaries"]
    run.inputs_json.write_text(json.dumps(inputs))
    run.records.begin(inputs_sha256(inputs))
    (tmp_path / "link").symlink_to(source)
    moved = replace(copied, model=str(tmp_path / "link" / "model"))
    for config in (copied, moved, copied):
        assert done_before(gone_on(config)) == list(STAGES[:-1])
    with pytest.raises(ValueError, match="canaries = 0 there, canaries = 3 here"):
        gone_on(replace(copied, canaries=3))


def test_the_manifest_names_what_the_run_began_with(copied: Config, source: Path) -> None:
    run = RunFolder(Path(copied.out))
    said = json.loads((run.onnx / "manifest.json").read_text())["provenance"]
    pinned = json.loads(run.inputs_json.read_text())
    assert said["data"] == "data.jsonl"
    assert said["data_sha256"] == files_sha256(source, ["data.jsonl"])["data.jsonl"]
    assert said["tokenizer_sha256"] == combined_sha256(pinned["tokenizer"]["files"])
    assert said["model_sha256"] == combined_sha256(pinned["model"]["files"])
    assert str(source) not in json.dumps(said)


def test_a_run_from_before_records_is_taken_as_it_is_and_proven_anew(copied: Config) -> None:
    run = RunFolder(Path(copied.out))
    for file in (run.inputs_json, run.records.file):
        file.unlink()
    said = gone_on(copied)
    assert done_before(said) == ["train", "shrink", "export", "bench"]
    assert "taken as they are: tune_dense, learn_decision, recover, train, shrink" in said[0]
    assert "verify" in run.metrics()
    assert done_before(gone_on(copied)) == list(STAGES[:-1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl'?: no such file"),
        ({"model": "/no/where"}, "no config.json there"),
        # Of its one document all stands in another split.
        (
            {"dataset.decision_share": 1e-9, "dataset.test_share": 0.12},
            "the decision split has no block",
        ),
        ({"dataset.test_share": 2.0}, "test share 2.0"),
        ({"dataset.test_share": 0.0}, "test share 0.0"),
    ],
)
def test_a_wrong_call_leaves_nothing_behind(
    source: Path, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_stages(settings(source, tmp_path / "runs" / "one", **wrong), STAGES, Silent())
    assert list(tmp_path.iterdir()) == []


class StoppedAt(Silent):
    """Progress under which a signal comes at a step of a phase."""

    def __init__(self, phase: str, step: int) -> None:
        super().__init__()
        self.phase_of_stop, self.step = phase, step

    def record(self, *records: Any) -> None:
        if (records[0].phase, records[0].step) == (self.phase_of_stop, self.step):
            raise Stopped(signal.SIGTERM)


def test_stopped_it_says_what_is_saved_and_damage_to_that_goes_back_a_phase(
    source: Path, finished: Config, tmp_path: Path
) -> None:
    config = settings(source, tmp_path / "run")
    with pytest.raises(Stopped) as stopped:
        run_stages(config, STAGES, StoppedAt("recovery", 4))
    assert stopped.value.__notes__ == [
        "saved: dense baseline, joint done; recovery up to step 4; go on with "
        f"`atp-edge run --config {config.out}/config.toml`"
    ]
    flip(Path(config.out) / "checkpoint" / "state.pt")
    said = gone_on(config, STAGES[:1])
    assert any("state.pt is damaged" in text and "begins anew" in text for text in said)
    ours, theirs = (files_sha256(Path(c.out), [TUNED, PLAN, "dense"]) for c in (config, finished))
    assert ours == theirs


def test_a_page_is_of_what_there_is_though_signals_come_while_it_is_written(
    copied: Config,
    monkeypatch: pytest.MonkeyPatch,
    signals: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, written = RunFolder(Path(copied.out)), report.write_report

    def stopped(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def stopped_too(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        written(*arguments)

    monkeypatch.setattr(verify, "verify", stopped)
    monkeypatch.setattr(report, "write_report", stopped_too)
    assert "proven equal to its PyTorch model" in (run.path / "report.html").read_text()
    assert ended(monkeypatch, "verify", "--out", copied.out) == 130
    said = capsys.readouterr().err
    assert "stopped by SIGINT: saved: dense baseline, joint, recovery, train, shrink" in said
    assert said.endswith("; the same command does the rest\n")
    assert "proven equal to its PyTorch model" not in (run.path / "report.html").read_text()


def test_a_stage_that_failed_is_not_said_to_be_saved(tmp_path: Path) -> None:
    run = open_run(configured({"out": str(tmp_path / "run")}))
    run.add_part("tune_dense", {})
    run.records.keep("verify", read={}, failed="a logit differs")
    assert stages._saved(run).startswith("saved: dense baseline done; go on with ")


@pytest.mark.parametrize(
    "arguments", [[], ["tasks"], ["losses"], ["rounding"], ["--peers", "onnxruntime-genai"]]
)
def test_no_bench_reads_a_run_that_another_process_writes(
    finished: Config, arguments: list[str]
) -> None:
    with RunFolder(Path(finished.out)).held():
        result = CliRunner().invoke(app, ["bench", *arguments, "--out", finished.out])
    assert isinstance(result.exception, TakenError)


def test_of_files_that_changed_since_nothing_is_claimed(copied: Config) -> None:
    run, invoked = RunFolder(Path(copied.out)), CliRunner()
    asked = ["report", "--out", copied.out, "--require", "proven"]
    assert invoked.invoke(app, asked).exit_code == 0
    assert "proven equal to its PyTorch model" in (run.path / "report.html").read_text()
    shutil.copy(run.onnx_dense / "model.onnx.data", run.onnx / "model.onnx.data")
    with pytest.raises(ConditionNotMetError, match=r"proven: files changed after .*verify"):
        invoked.invoke(app, asked, catch_exceptions=False)
    page = (run.path / "report.html").read_text()
    assert "NOT what was measured: files changed after" in page
    assert "proven equal to its PyTorch model" not in page
