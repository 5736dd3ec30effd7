"""The one command for a GPU: every section at toy size, and what its runner makes of trouble."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from atp_bench.acceptance.runner import Section, run_sections
from atp_bench.acceptance.sizes import TOY, sizes_for

from tests.test_docs import ROOT

SCRIPT = ROOT / "bench" / "gpu_acceptance.py"


def the_script() -> Any:
    spec = spec_from_file_location("gpu_acceptance", SCRIPT)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toy(name: str) -> dict[str, Any]:
    """A section's figures at toy size; what it keeps on its way can be written as JSON."""
    kept: list[str] = []
    found: dict[str, Any] = (
        the_script().SECTIONS[name].load()(TOY, lambda found: kept.append(json.dumps(found)))
    )
    json.dumps(found)
    assert kept or name == "environment"
    return found


def test_environment() -> None:
    found = toy("environment")
    assert found["packages"]["torch"]
    assert found["versions"]["torch"]


def test_ceilings() -> None:
    found = toy("ceilings")
    assert found["rows"]["product"]["flops_per_s"] > 0
    assert found["rows"]["copy"]["bytes_per_s"] > 0
    assert found["launch_us"] > 0


def test_every_rival_of_a_projection_is_right() -> None:
    for case in toy("projections")["cases"]:
        told = {name: row["right"] for name, row in case["rows"].items() if "right" in row}
        assert len(told) == 8
        assert all(told.values()), told


def test_layers_of_every_step() -> None:
    steps = toy("layers")["steps"]
    kinds = ("dense", "joint", "generator", "recovery")
    ours = {f"ours, {kind}, {by}" for kind in kinds for by in ("torch", "joined")}
    assert ours < steps.keys()
    assert all(row["over_peft_wall_ms"] > 0 for row in steps.values())


def test_a_whole_model_goes_through_every_phase_beside_what_is_said_of_it() -> None:
    phases = toy("whole")["phases"]
    assert phases.keys() == {"dense baseline", "joint steps", "freeze", "recovery"}
    for name, row in phases.items():
        assert row["said_bytes"] > 0
        assert name == "freeze" or all(0 < loss < 20 for loss in row["losses"])


def test_the_loss_in_chunks_has_the_gradient_of_torchs() -> None:
    rows = toy("loss")["rows"]
    assert len(rows) == 3
    assert all(row.get("difference", 0) < 0.02 for row in rows.values())


def test_closed_form_steps_stay_finite() -> None:
    assert toy("closed_form")["finite"] is True


def test_a_small_models_step() -> None:
    (rows,) = toy("small")["steps"].values()
    assert rows["torch"]["step_s"] > 0


def test_onnx_files_run() -> None:
    found = toy("onnx_runtime")
    assert found["rows"].keys() == {
        f"{model}, {precision}" for model in ("dense", "slim") for precision in ("fp16", "int4")
    }
    assert found["fp16, dense over slim"]["file_bytes"] > 1


def test_the_command_runs_sections_in_processes_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    names = ("correctness", "tiles")  # On Triton's interpreter, which is chosen at its import.
    asked = [part for name in names for part in ("--only", name)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--toy", "--json", str(out), *asked],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads(out.read_text())["sections"]
    assert {name: s["status"] for name, s in sections.items()} == dict.fromkeys(names, "done")
    correct = sections["correctness"]["found"]
    assert correct["triton"] == "runs"
    assert correct["right"], correct
    tiles = sections["tiles"]["found"]["cases"]["down backward, fixed"]
    assert len(tiles) == 3
    assert all(row["ms"] > 0 for row in tiles.values())


TROUBLE = """
import os, sys, time
from pathlib import Path
from atp_bench.acceptance.runner import run_one

def measure(sizes, keep):
    keep({"before": 1})
    if name == "hangs":
        time.sleep(60)
    if name == "dies":
        os._exit(3)
    if name == "lacks":
        import no_such_package
    if name == "fails":
        raise ValueError("what it met")
    return {"before": 1, "after": 2}

name, part, until = sys.argv[1:]
run_one(lambda: measure, None, Path(part), float(until))
"""


def test_a_section_in_trouble_takes_nothing_from_the_others(tmp_path: Path) -> None:
    script, out, said = tmp_path / "sections.py", tmp_path / "found.json", list[str]()
    script.write_text(TROUBLE)
    names = ("hangs", "dies", "lacks", "fails", "works")
    sections = {n: Section(load=lambda: None, seconds=8 if n == "hangs" else 60) for n in names}
    command = [sys.executable, str(script)]
    run_sections(sections, command, seconds=200, out=out, toy=True, say=said.append)
    found = json.loads(out.read_text())["sections"]
    assert {name: row["status"] for name, row in found.items()} == {
        "hangs": "out of time", "dies": "ended early", "lacks": "missing", "fails": "failed",
        "works": "done",
    }  # fmt: skip
    assert found["lacks"]["missing"] == "no_such_package"
    assert found["fails"]["error"] == "ValueError: what it met"
    assert all(row["found"]["before"] == 1 for row in found.values())
    assert found["works"]["found"]["after"] == 2
    assert len(said) == len(names)


def test_no_section_begins_without_time(tmp_path: Path) -> None:
    sections = {"one": Section(load=lambda: None, seconds=60)}
    found = run_sections(
        sections, ["false"], seconds=1, out=tmp_path / "o", toy=True, say=lambda _: None
    )
    assert found["sections"]["one"]["status"] == "no time was left"


def test_real_sizes_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="take --toy"):
        sizes_for(toy=False)
