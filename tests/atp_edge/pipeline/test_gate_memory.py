"""How the gate holds the dense model follows from the memory that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from atp_edge.config import Config
from atp_edge.gate.settings import Form, GateSettings
from atp_edge.model.checkpoint import save_narrow, shape_of
from atp_edge.model.structures import count_parameters
from atp_edge.pipeline import gate
from atp_edge.pipeline.device import USABLE, Device
from atp_edge.pipeline.memory_after import gate_part
from atp_edge.run.folder import RunFolder
from tests.tiny import Silent, tiny_model


class BegunError(Exception):
    """The models would be read next."""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    save_narrow(tiny_model("llama").to(torch.bfloat16), None, run.dense)
    save_narrow(tiny_model("llama").to(torch.bfloat16), None, run.slim)
    run.onnx.mkdir()
    (run.onnx / "config.json").touch()
    return run


@pytest.mark.parametrize(
    ("memory", "expected"), [("enough", False), ("between", True), ("little", None)]
)
@pytest.mark.parametrize("form", ["onnx", "slim"])
def test_fp32_where_it_fits_then_as_stored_then_refused(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, form: Form, memory: str, expected: bool | None
) -> None:
    shape = shape_of(run.dense)
    shipped = 4.0 * count_parameters(shape).whole if form == "slim" else 0.0
    asked = gate_part(shape, torch.bfloat16, shipped)
    assert asked.instead is not None
    most, least = asked.device_bytes, asked.instead.device_bytes
    there = {"enough": 1.1 * most, "between": (most + least) / 2, "little": 0.9 * least}[memory]
    device = Device(kind="cpu", name="this CPU", memory=there / USABLE, host=1e9, disk=1e9,
                    quantizes=False)  # fmt: skip
    monkeypatch.setattr(gate, "device_of", lambda asked, out: device)
    held: list[bool] = []

    def judge(*_: Any, as_stored: bool) -> None:
        held.append(as_stored)
        raise BegunError

    monkeypatch.setattr(gate, "judge", judge)
    refused = expected is None
    error, says = (ValueError, "gate takes") if refused else (BegunError, None)
    with pytest.raises(error, match=says):
        gate.judged_run(Config(), run, Silent(), GateSettings(form=form))
    assert held == ([] if refused else [expected])
