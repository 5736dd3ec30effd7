"""A provider is one that runs here: ONNX Runtime takes the CPU for one that does not, silently."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from atp_export.runtime import Session, providers
from onnx import helper

from tests.atp_edge.pipeline.test_runs_of_before import STORED

CUDA, CPU = providers.CUDA, providers.CPU


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    providers.usable_providers.cache_clear()
    yield
    providers.usable_providers.cache_clear()


def offered(monkeypatch: pytest.MonkeyPatch, *, device: bool) -> None:
    """The package offers CUDA; there is a device or none."""
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(providers, "has_device", lambda: device)


def test_a_gpu_without_its_libraries_is_not_said_to_compute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    offered(monkeypatch, device=True)
    monkeypatch.setattr(providers, "starts", lambda provider: provider == CPU)
    with caplog.at_level(logging.WARNING):
        assert providers.usable_providers() == [CPU]
    assert "does not start" in caplog.text
    with pytest.raises(ValueError, match=rf"provider '{CUDA}' does not start here"):
        Session(STORED / "finished" / "onnx", provider=CUDA)
    assert Session(STORED / "finished" / "onnx").provider == CPU


def test_a_gpu_that_starts_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "starts", lambda _: True)
    offered(monkeypatch, device=True)
    assert providers.usable_providers() == [CUDA, CPU]
    providers.usable_providers.cache_clear()
    offered(monkeypatch, device=False)
    assert providers.usable_providers() == [CPU]


@pytest.mark.parametrize("device", ["nvidia0", "nvidia1", "dxg"])
def test_any_device_of_the_driver_counts(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 31: the first GPU may be another process's, and WSL has its own name."""
    monkeypatch.setattr(providers, "Path", lambda _: tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not providers.has_device()
    (tmp_path / device).touch()
    assert providers.has_device()


def test_the_model_that_is_tried_is_one_identity() -> None:
    value = [helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "g", value[:1], value[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert onnx.load_from_string(providers.ONE_NODE) == made
    assert providers.starts(CPU)
    with pytest.raises(ValueError, match="this ONNX Runtime has"):
        providers.provider_of("NoneExecutionProvider")
