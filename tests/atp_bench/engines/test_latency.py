"""Benches of two exported models: what is measured, what follows from it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from atp_bench.engines import OURS
from atp_bench.engines.latency import BenchReport, bench_onnx
from atp_bench.engines.memory import peak_memory_and_load
from atp_export.export import export_onnx

from atp_edge.model.checkpoint import save_narrow
from tests.tiny import tiny_model

LATENCIES = ("first_token_ms", "token_ms_p50")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wide and a narrow random Llama as ONNX; the wide one does some fifty times the work."""
    root = tmp_path_factory.mktemp("models")
    for name, channels in (("dense", 8192), ("slim", 64)):
        model = tiny_model("llama", hidden_size=240, intermediate_size=channels)
        save_narrow(model, None, root / f"{name}-hf")
        export_onnx(root / f"{name}-hf", root / name)
    return {name: root / name for name in ("dense", "slim")}


@pytest.fixture(scope="module")
def report(folders: dict[str, Path]) -> BenchReport:
    return bench_onnx(folders, prompt_tokens=16, new_tokens=8, rounds=4, threads=1)


def test_the_model_with_less_work_is_faster_smaller_and_lighter(report: BenchReport) -> None:
    dense, slim = report.rows["dense"], report.rows["slim"]
    assert dense.token_ms_p50 > 1.5 * slim.token_ms_p50
    assert dense.first_token_ms > 1.5 * slim.first_token_ms
    assert dense.peak_memory_bytes - slim.peak_memory_bytes > 40 * 2**20


def test_the_file_size_is_what_lies_in_the_folder(
    report: BenchReport, folders: dict[str, Path]
) -> None:
    for name, folder in folders.items():
        on_disk = sum(f.stat().st_size for f in folder.iterdir() if f.name.startswith("model.onnx"))
        assert report.rows[name].file_bytes == on_disk


def test_ratios_are_of_the_rows_and_lie_where_the_rounds_do(report: BenchReport) -> None:
    dense, slim = report.rows["dense"], report.rows["slim"]
    for key, ratio in report.ratios.items():
        assert ratio == pytest.approx(getattr(dense, key) / getattr(slim, key))
    for key in LATENCIES:
        low, high = report.spreads[key]
        assert 1 < low <= high


def test_throughput_and_percentiles_agree(report: BenchReport) -> None:
    for row in report.rows.values():
        assert 0 < row.token_ms_p50 <= row.token_ms_p95
        assert row.tokens_per_s == pytest.approx(1e3 / row.token_ms_p50)
        assert row.load_ms > 0


def test_models_take_turns_and_every_other_round_goes_backwards(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from atp_bench.engines import latency

    order: list[list[str]] = []
    take = latency._round

    def seen(engines: Any, *lengths: int) -> Any:
        order.append(list(engines))
        return take(engines, *lengths)

    monkeypatch.setattr(latency, "_round", seen)
    bench_onnx(folders, prompt_tokens=2, new_tokens=1, rounds=3, threads=1)
    forward, backward = ["dense", "slim"], ["slim", "dense"]
    assert order == [forward, forward, backward, forward]


def test_tokens_are_generated_in_turns() -> None:
    from atp_bench.engines import latency

    calls: list[str] = []

    class Counted:
        vocabulary, provider = 10, "none"

        def __init__(self, name: str) -> None:
            self.name = name

        def start(self, batch: int, capacity: int) -> Counted:
            assert (batch, capacity) == (2, 14)
            return self

        def first(self, prompts: Any) -> None:
            calls.append(self.name + str(prompts.shape))

        def next(self) -> None:
            calls.append(self.name)

    engines = {name: Counted(name) for name in "ab"}
    taken = latency._round(engines, 2, 3, 10)
    assert calls == ["a(2, 3)", "b(2, 3)", *"a" * 8, *"b" * 8, *"a" * 2, *"b" * 2]
    assert [len(figures.token_ms) for figures in taken.values()] == [10, 10]


def test_the_report_is_json_with_settings_and_environment(report: BenchReport) -> None:
    read = json.loads(json.dumps(report.to_dict()))
    assert read["settings"] == {
        "prompt_tokens": 16,
        "new_tokens": 8,
        "rounds": 4,
        "batch": 1,
        "provider": report.settings["provider"],
        "threads": 1,
    }
    assert read["settings"]["provider"].endswith("ExecutionProvider")
    assert {"cpu", "cores", "memory_bytes", "versions", "date"} <= set(read["environment"])


@pytest.mark.parametrize("setting", ["prompt_tokens", "new_tokens", "rounds", "batch"])
def test_settings_below_one_are_refused_before_anything_is_loaded(setting: str) -> None:
    nowhere = {"dense": Path("nowhere"), "slim": Path("nowhere")}
    with pytest.raises(ValueError, match=f"{setting} is 0: expected 1 or more"):
        bench_onnx(nowhere, **{setting: 0})


def test_more_rows_take_more_time_a_step_and_less_a_token(
    report: BenchReport, folders: dict[str, Path]
) -> None:
    eight = bench_onnx(folders, prompt_tokens=16, new_tokens=8, rounds=2, batch=8, threads=1)
    assert eight.settings["batch"] == 8
    alone, together = report.rows["dense"], eight.rows["dense"]
    assert together.first_token_ms > 2 * alone.first_token_ms
    assert together.tokens_per_s > 2 * alone.tokens_per_s
    assert together.tokens_per_s == pytest.approx(8e3 / together.token_ms_p50)


def test_a_single_model_cannot_be_compared(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"got 1 model\(s\) \(dense\): expected two or more"):
        bench_onnx({"dense": folders["dense"]})


def test_the_memory_of_the_process_that_asks_is_not_counted(folders: dict[str, Path]) -> None:
    def peak() -> int:
        return peak_memory_and_load(
            folders["slim"], prompt_tokens=4, new_tokens=2, threads=1, engine=OURS, batch=1
        )[0]

    before = peak()
    ballast = np.ones(2**30, np.uint8)
    during = peak()
    assert during < before + ballast.nbytes / 4


def test_a_folder_without_a_model_says_so_from_the_fresh_process(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"holds no model\.onnx; expected a run"):
        peak_memory_and_load(
            tmp_path, prompt_tokens=1, new_tokens=1, threads=1, engine=OURS, batch=1
        )
