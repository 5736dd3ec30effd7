"""`atp-edge gate` on a stored run: verdicts, exit codes, what ships, and the gate in CI."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
import yaml
from atp_export.runtime import Generator
from atp_export.runtime.domain import BITS, DomainProfile, write_profile
from typer.testing import CliRunner

from atp_edge import Run
from atp_edge.cli import app
from atp_edge.gate.outputs import schema
from atp_edge.gate.settings import GateSettings
from atp_edge.pipeline import gate as pipeline_gate
from atp_edge.run.errors import ConditionNotMetError
from atp_edge.run.folder import RunFolder
from atp_edge.run.hashes import files_sha256
from atp_edge.settings import to_toml, with_values
from tests.atp_edge.pipeline.test_runs_of_before import STORED

ROOT = Path(__file__).parents[3]
LOOSE = """
[quality]
documents = 12
document_tokens = 16
loss = 9
slice_loss = 9
kl = 9
[tasks]
items = 0
[calibration]
error = 1
[bias]
pairs = 64
gap = 9
attribute = 9
[memorization]
prefixes = 10
prefix_tokens = 8
continued_tokens = 4
extracted = 0.3
"""


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the stored runs, the finished one proven anew."""
    folder = tmp_path_factory.mktemp("gate") / "runs"
    shutil.copytree(STORED, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        CliRunner().invoke(app, ["verify", "--out", "finished"], catch_exceptions=False)
    (folder / "gate.toml").write_text(LOOSE)
    return folder


@pytest.fixture
def runs(proven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(proven, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    return tmp_path / "runs"


def gate(*arguments: str) -> tuple[dict[str, Any], Exception | None]:
    """gate.json, and what the command raised."""
    done = CliRunner().invoke(app, ["gate", "--out", "finished", *arguments])
    error = done.exception
    if error is not None and not isinstance(error, ConditionNotMetError):
        raise error
    content: dict[str, Any] = json.loads(Path("finished/gate.json").read_text())
    jsonschema.validate(content, schema())
    return content, error  # type: ignore[return-value]


def statuses(content: dict[str, Any]) -> dict[str, str]:
    return {
        f"{c['name']} [{c['slice']}]" if c["slice"] else c["name"]: c["status"]
        for c in content["checks"]
    }


@pytest.mark.parametrize("form", ["onnx", "slim"])
def test_it_passes_within_its_margins_and_names_the_files_that_it_judged(
    runs: Path, form: str
) -> None:
    content, error = gate("--config", "gate.toml", "--form", form)
    assert error is None
    assert content["verdict"] == "passed"
    assert {path.partition("/")[0] for path in content["files"]} == {form, "dense"}
    found = statuses(content)
    assert found["proof"] == found["tokenizer"] == found["loss"] == "passed"
    assert found["licence" if form == "onnx" else "proof"] in ("undecided", "passed")
    page = (runs / "finished" / "report.html").read_text()
    first = page.index("The gate PASSED it" if form == "onnx" else "The gate PASSED slim/")
    assert first < page.index("<table>")
    assert page.index('class="sentence') < first


def test_the_default_profile_says_no_and_exits_4(runs: Path) -> None:
    content, error = gate("--junit", "out/gate.xml", "--json", "out/gate.json")
    assert isinstance(error, ConditionNotMetError)
    assert content["verdict"] == "failed"
    assert statuses(content)["loss"] == "failed"
    assert any("loss on text over the dense model's" in reason for reason in content["reasons"])
    assert json.loads(Path("out/gate.json").read_text()) == content
    assert ElementTree.parse("out/gate.xml").getroot().get("failures") != "0"
    metrics = json.loads(Path("finished/metrics.json").read_text())
    assert metrics["gate"]["verdict"] == "failed"


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


class BegunError(Exception):
    """The models would be read next."""


def test_a_file_s_profile_is_over_the_run_s_and_old_outputs_go_first(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate that is killed left the verdict of before beside the run, on other files."""
    asked: list[str] = []

    def judge(run: object, config: object, settings: GateSettings, *_: Any, **__: Any) -> None:
        asked.append(settings.profile)
        raise BegunError

    monkeypatch.setattr(pipeline_gate, "judge", judge)
    run = RunFolder(runs / "finished")
    run.config_toml.write_text(to_toml(with_values(run.config(), {"gate.profile": "legal"})))
    old = [Path("old.json"), Path("old.xml")]
    for text in ("profile = 'clinical'", "profile = 'default'", "level = 0.01"):
        Path("gate.toml").write_text(text)
        for path in old:
            path.write_text("passed")
        with pytest.raises(BegunError):
            gate("--config", "gate.toml", "--json", "old.json", "--junit", "old.xml")
        assert not any(path.exists() for path in old)
    assert asked == ["clinical", "default", "legal"]


def test_files_that_were_not_proven_do_not_pass(runs: Path) -> None:
    """Proof and manifest are of the very files that ship."""
    finished = runs / "finished"
    (finished / "onnx" / "more.txt").write_text("not shipped")
    with pytest.raises(ValueError, match=r"onnx/more\.txt"):
        gate("--config", "gate.toml")
    (finished / "onnx" / "more.txt").unlink()
    metrics = json.loads((finished / "metrics.json").read_text())
    del metrics["verify"]
    (finished / "metrics.json").write_text(json.dumps(metrics))
    content, error = gate("--config", "gate.toml")
    assert error is not None
    assert statuses(content)["proof"] == "failed"
    assert "nothing is proven yet" in " ".join(content["reasons"])


def test_without_the_records_a_verdict_is_of_nobody_knows_what(runs: Path) -> None:
    """A changed model whose records are gone is not shown as the one that passed."""
    finished = runs / "finished"
    gate("--config", "gate.toml")
    (finished / "stages.json").unlink()
    damage(finished / "dense" / "model.safetensors")
    assert "NOT what was measured" in Run.open(finished).verdict.sentence
    done = CliRunner().invoke(app, ["report", "--out", "finished", "--require", "gate"])
    assert isinstance(done.exception, ConditionNotMetError)
    assert "done again: verify, gate" in " ".join(done.output.split())
    assert "PASSED" not in (finished / "report.html").read_text()
    left = {"gate.json", "gate.xml", "domain.npz"} & {path.name for path in finished.iterdir()}
    assert not left
    assert "gate" not in json.loads((finished / "metrics.json").read_text())


def test_a_hidden_file_among_what_ships_is_none_that_was_judged(runs: Path) -> None:
    gate("--config", "gate.toml")
    (runs / "finished" / "onnx" / ".hidden").touch()
    assert "NOT what was measured" in Run.open(runs / "finished").verdict.sentence
    with pytest.raises(ValueError, match=r"onnx/\.hidden is new"):
        gate("--config", "gate.toml")


def test_what_cannot_or_must_not_be_written_is_refused_before_the_gate_works(runs: Path) -> None:
    finished = runs / "finished"
    asked = [
        ("--junit", "gate.toml"),
        ("--json", "data.jsonl"),
        ("--json", "rules.jsonl"),
        ("--json", "finished/config.toml"),
        ("--junit", "finished/metrics.json"),
    ]
    for flag, name in asked:
        (runs / "rules.jsonl").write_text('{"prompt": "a", "max_length": 9}')
        before = (runs / name).read_bytes()
        with pytest.raises(ValueError, match="name another place"):
            gate("--config", "gate.toml", "--prompts", "rules.jsonl", flag, name)
        assert (runs / name).read_bytes() == before
    (finished / "domain.npz").mkdir()
    with pytest.raises(ValueError, match=r"domain\.npz is a folder"):
        gate("--config", "gate.toml")
    assert not (finished / "gate.json").exists()


def test_further_text_is_a_slice_and_what_training_read_is_left_out(runs: Path) -> None:
    """Rows that repeat each other are one document, or a few texts copied often would decide."""
    rows = (runs / "data.jsonl").read_text().splitlines()
    other = [{"text": "A tired miller told the baker so.", "kind": "told"}] * 9
    other += [{"text": f"Nobody came at noon {i}.", "kind": "noon"} for i in range(9)]
    (runs / "more.jsonl").write_text("\n".join([*rows, *map(json.dumps, other)]))
    with pytest.raises(ValueError, match=r"slice_by = 'kind': no row of data\.jsonl has"):
        gate("--config", "gate.toml", "--slice-by", "kind")
    (runs / "gate.toml").write_text(LOOSE.replace("documents = 12", "documents = 100"))
    alone, _ = gate("--config", "gate.toml")
    content, _ = gate("--config", "gate.toml", "--data", "more.jsonl")
    own, with_more = (
        [
            c
            for c in found["checks"]
            if c["name"] in ("loss", "kl", "calibration") and not c["slice"]
        ]
        for found in (alone, content)
    )
    assert own == with_more, "the run's own text is judged by itself"
    clusters = {c["slice"]: c["clusters"] for c in content["checks"] if c["name"] == "loss"}
    assert clusters.keys() == {"", "more/all"}
    assert clusters["more/all"] == 10
    told = " ".join(content["notes"])
    assert f"training read {len(rows) - clusters['']} rows, or nearly: left out" in told
    assert f"{8 + clusters['']} documents repeat another word for word: read once" in told
    lines = [json.loads(row)["text"] for row in rows]
    (runs / "read.jsonl").write_text("\n".join(json.dumps({"text": f" {x}!"}) for x in lines))
    content, _ = gate("--config", "gate.toml", "--data", "read.jsonl")
    (repeated,) = (c for c in content["checks"] if c["slice"] == "read/all")
    assert (repeated["status"], repeated["clusters"]) == ("undecided", 0), "of other spaces alone"
    with pytest.raises(ValueError, match=r"nowhere\.jsonl'?: no such file"):
        gate("--config", "gate.toml", "--data", "nowhere.jsonl")


def test_prompts_are_asked_of_the_shipped_runtime(runs: Path) -> None:
    rules = [
        {"prompt": "The old baker carried a", "regex": "(?s).*"},
        {"prompt": "The old baker carried a", "regex": "(?s).*", "expect": "never", "name": "any"},
    ]
    (runs / "rules.jsonl").write_text("\n".join(map(json.dumps, rules)))
    content, error = gate("--config", "gate.toml", "--prompts", "rules.jsonl")
    assert isinstance(error, ConditionNotMetError)
    found = statuses(content)
    assert found["prompt [rules.jsonl, line 1]"] == "passed"
    assert found["prompt [any]"] == "failed"


def test_a_folder_of_export_is_judged_and_the_run_stays_as_it_is(runs: Path) -> None:
    finished, to = runs / "finished", runs / "finished" / "fp16"
    gate("--config", "gate.toml")

    def called(*arguments: str) -> None:
        CliRunner().invoke(app, [*arguments, "--out", "finished"], catch_exceptions=False)

    called("export", "--to", str(to), "--precision", "fp16")
    before = files_sha256(finished, ["."])
    judge = ("gate", "--folder", str(to), "--config", "gate.toml", "--json", "found.json")
    called(*judge)
    found = json.loads(Path("found.json").read_text())
    jsonschema.validate(found, schema())
    assert found["verdict"] == "passed"
    assert {path.partition("/")[0] for path in found["files"]} == {"fp16", "dense"}
    assert "proven as it was written" in str(found["checks"])
    assert files_sha256(finished, ["."]) == before
    own = json.loads((finished / "gate.json").read_text())
    assert own["figures"]["text"] != found["figures"]["text"], "fp16 is not fp32"
    with pytest.raises(ValueError, match="leave --form slim out"):
        called(*judge, "--form", "slim")
    with pytest.raises(ValueError, match="onnx is the run's own: leave --folder out"):
        called("gate", "--folder", "finished/onnx")
    damage(to / "model.onnx.data")
    with pytest.raises(ValueError, match=r"model\.onnx\.data"):
        called(*judge)


def test_a_profile_is_of_the_folder_that_it_lies_in_or_of_the_run_s_own_onnx(runs: Path) -> None:
    finished = runs / "finished"
    gate("--config", "gate.toml")
    assert Generator(finished / "onnx").domain
    for foreign in (finished / "other", runs / "other"):
        shutil.copytree(finished / "onnx", foreign)
        assert Generator(foreign).domain is None
        shutil.copy(finished / "domain.npz", foreign)
        assert Generator(foreign).domain
    (runs / "other" / "domain.npz").rename(runs / "domain.npz")
    assert Generator(runs / "other").domain


def test_the_gate_in_ci_of_the_guide_runs_as_it_is_written(runs: Path, tmp_path: Path) -> None:
    """The `run:` lines of docs/gate.md, where pip is a stand-in and nothing else is."""
    page = (ROOT / "docs" / "gate.md").read_text()
    written = re.search(r"```yaml\n(.*?)```", page, re.S)
    assert written is not None
    workflow = yaml.safe_load(written[1])
    steps = workflow["jobs"]["gate"]["steps"]
    lines = [step["run"] for step in steps if "run" in step]
    assert sum("atp-edge gate" in line for line in lines) == 1
    upload = next(step for step in steps if "upload-artifact" in step.get("uses", ""))
    assert upload["if"] == "always()"
    shims = tmp_path / "bin"
    shims.mkdir()
    called = f'exec {sys.executable} -c "from atp_edge.cli import main; main()" "$@"'
    for name, text in {"pip": "exit 0", "atp-edge": called}.items():
        (shims / name).write_text(f"#!/bin/sh\n{text}\n")
        (shims / name).chmod(0o755)
    (runs / "runs").mkdir()
    shutil.move(runs / "finished", runs / "runs" / "notes")
    shutil.copy(runs / "gate.toml", runs / "ci.toml")
    environment = os.environ | {"PATH": f"{shims}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    codes = [
        subprocess.run(
            ["bash", "-e", "-c", line], cwd=runs, env=environment, capture_output=True, check=False
        ).returncode
        for line in lines
    ]
    assert codes == [0] * len(lines)
    report = next(path for path in upload["with"]["path"].split() if path.endswith(".xml"))
    assert ElementTree.parse(runs / report).getroot().get("failures") == "0"


def test_a_prompt_outside_the_domain_is_warned_of_refused_or_handed_over(runs: Path) -> None:
    gate("--config", "gate.toml")
    text = json.loads((runs / "data.jsonl").read_text().splitlines()[3])["text"]
    foreign = "zq xw vk jj qz wx kv zz qq xx"

    def say(prompt: str, *arguments: str) -> tuple[str, Exception | None]:
        command = ["generate", prompt, "--out", "finished", "--max-new-tokens", "2", *arguments]
        done = CliRunner().invoke(app, command)
        return done.output, done.exception  # type: ignore[return-value]

    assert "outside the domain" not in say(text[:60])[0]
    said, error = say(foreign)
    assert error is None
    assert "outside the domain that the model was made for" in said
    assert isinstance(say(foreign, "--outside", "refuse")[1], ConditionNotMetError)
    assert "outside" not in say(foreign, "--outside", "ignore")[0]
    shutil.copytree(runs / "finished" / "onnx", runs / "dense-onnx")
    for slim in ("finished/onnx", "dense-onnx"):
        with pytest.raises(ValueError, match="holds the slim model itself"):
            raise say(foreign, "--fallback", slim)[1]  # type: ignore[misc]
    manifest = json.loads((runs / "dense-onnx" / "manifest.json").read_text())
    for file in manifest["files"].values():
        file["sha256"] = "ab" * 32
    (runs / "dense-onnx" / "manifest.json").write_text(json.dumps(manifest))
    said, error = say(foreign, "--outside", "refuse", "--fallback", "dense-onnx")
    assert error is None
    assert "dense-onnx answers" in said
    profile = DomainProfile(bits=np.zeros(BITS // 8, np.uint8), thresholds={})
    write_profile(profile, runs / "finished" / "domain.npz")
    with pytest.raises(ValueError, match=r"domain\.npz changed .* since the gate"):
        raise say(text[:60])[1]  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"domain\.npz changed .* since the gate"):
        Run.open(runs / "finished").generator()
    RunFolder(runs / "finished").records.drop(["gate"])
    with pytest.raises(ValueError, match=r"domain\.npz holds no threshold"):
        raise say(foreign, "--outside", "refuse")[1]  # type: ignore[misc]
    (runs / "finished" / "domain.npz").write_text("none")
    with pytest.raises(ValueError, match=r"domain\.npz is no profile"):
        raise say(text[:60])[1]  # type: ignore[misc]
    (runs / "finished" / "domain.npz").unlink()
    for arguments in (("--outside", "refuse"), ("--fallback", "dense-onnx")):
        with pytest.raises(ValueError, match="nothing tells which domain"):
            raise say(foreign, *arguments)[1]  # type: ignore[misc]
    with (runs / "dense-onnx" / "model.onnx.data").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"model\.onnx\.data"):
        raise say(foreign, "--fallback", "dense-onnx")[1]  # type: ignore[misc]
