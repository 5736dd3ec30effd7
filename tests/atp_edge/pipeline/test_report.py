"""The report and the summary: every figure that is there is shown, and only those."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from atp_edge.model.plan import all_kept, write_plan
from atp_edge.pipeline.report import cards, write_report
from atp_edge.pipeline.report_figures import bench_figure
from atp_edge.pipeline.summary import rows_of, table
from atp_edge.run.history import Record
from tests.tiny import tiny_model

STEPS, FREEZE = 40, 16


def bench_row(scale: float) -> dict[str, float]:
    return {
        "first_token_ms": 410.0 * scale,
        "token_ms_p50": 31.0 * scale,
        "token_ms_p95": 36.0 * scale,
        "tokens_per_s": 32.0 / scale,
        "load_ms": 820.0 * scale,
        "file_bytes": int(651e6 * scale),
        "peak_memory_bytes": int(1.31e9 * scale),
    }


def metrics() -> dict[str, Any]:
    """What the stages of a whole run write."""
    return {
        "train": {
            "untuned_perplexity": 18.4,
            "dense_tuned_perplexity": 13.0,
            "perplexity_at_freeze": 61.2,
            "perplexity": 20.8,
            "recovery": 0.625,
            "masked_narrow_max_error": 2.1e-5,
            "steps": STEPS,
            "tokens": STEPS * 512,
            "seconds": 300.1,
            "kernels": "torch",
            "budget": "params=0.6",
            "decoder_share": 0.5999,
            "whole_share": 0.684,
            "plan_sha256": "ab" * 32,
            "data": {
                "documents": {"train": 90, "decision": 11, "test": 12},
                "tokens": {"train": 250000, "decision": 31000, "test": 33000},
                "duplicates_removed": 7,
                "sha256": "cd" * 32,
            },
        },
        "shrink": {
            "dense": {"decoder_parameters": 106e6, "parameters": 134.5e6, "bytes": 269e6},
            "slim": {"decoder_parameters": 63.6e6, "parameters": 92e6, "bytes": 184e6},
            "decoder_share": 0.5999,
            "whole_share": 0.684,
            "masked_narrow_max_error": 2.1e-5,
            "perplexity": 20.8,
        },
        "export": {
            "dense": {"onnx_bytes": 651e6, "seconds": 5.0},
            "slim": {"onnx_bytes": 430e6, "seconds": 4.0},
            "precision": "fp32",
        },
        "verify": {
            "providers": {
                "CPUExecutionProvider": {
                    "passed": True,
                    "logits_max_error": 3.1e-5,
                    "logits_mean_error": 2e-6,
                    "logits_relative_error": 1e-6,
                    "greedy_same": 20,
                    "greedy_total": 20,
                    "stepwise_max_error": 2e-5,
                    "batched_same": True,
                    "failures": [],
                }
            }
        },
        "bench": {
            "rows": {"dense": bench_row(1.0), "slim": bench_row(0.66)},
            "ratios": {k: 1 / 0.66 for k in bench_row(1.0) if k != "tokens_per_s"},
            "spreads": {"first_token_ms": [1.4, 1.6], "token_ms_p50": [1.45, 1.55]},
            "settings": {"prompt_tokens": 128, "new_tokens": 64, "rounds": 5, "batch": 1},
            "environment": {
                "cpu": "AMD EPYC",
                "cores": 2,
                "memory_bytes": 25 * 10**9,
                "gpu": None,
                "python": "3.11.7",
                "versions": {"torch": "2.13.0", "onnx": "1.23.2"},
                "date": "2026-11-24",
            },
        },
        "gate": gate_figures(),
    }


def gate_figures() -> dict[str, Any]:
    check = {"name": "loss", "slice": "rare", "status": "failed", "dense": 13.0, "slim": 20.8,
             "difference": 0.47, "limit": 0.25, "clusters": 40}  # fmt: skip
    flip = {"task": "clause", "slice": "rare", "kind": "right to wrong", "prompt": "<b>p</b>",
            "expected": "e", "dense": "e", "slim": "<script>alert(1)</script>"}  # fmt: skip
    return {
        "verdict": "failed", "reasons": ["failed: loss on 'rare': +0.470 nats a token"],
        "counts": {"passed": 3, "failed": 1, "undecided": 2}, "profile": "legal", "form": "onnx",
        "checks": [check], "flips": [flip], "figures": {}, "seconds": 60.0,
    }  # fmt: skip


def history() -> list[Record]:
    """A dense baseline, then control and recovery, falling as losses do."""
    dense = [
        Record(step=i, phase="dense", loss=2.2 + 1 / (i + 1), lr=1e-3, tokens=512 * (i + 1))
        for i in range(STEPS)
    ]
    control = [
        Record(
            step=i,
            phase="control",
            loss=2.6 + 0.1 * i,
            lr=1e-3,
            tokens=512 * (i + 1),
            decision_loss=3.0 + 0.05 * i if i % 2 else None,
            kept_share=1 - 0.025 * i,
            soft_share=1 - 0.02 * i,
            churn=0.05 / (i + 1) if i % 2 else None,
        )
        for i in range(FREEZE)
    ]
    recovery = [
        Record(step=i, phase="recovery", loss=2.4 + 6 / i, lr=1e-3, tokens=512 * i, kept_share=0.6)
        for i in range(FREEZE, STEPS)
    ]
    return [*dense, *control, *recovery]


def whole_run(folder: Path, figures: dict[str, Any]) -> Path:
    from atp_edge.model.families import model_shape

    (folder / "metrics.json").write_text(json.dumps(figures))
    (folder / "config.toml").write_text('model = "<script>alert(1)</script>"\nsteps = 40\n')
    (folder / "history.jsonl").write_text("".join(json.dumps(asdict(r)) + "\n" for r in history()))
    write_plan(all_kept(model_shape(tiny_model("llama").config)), folder / "plan.json")
    return folder


class Page(HTMLParser):
    """What a reader gets: visible text, headings, drawings, and everything fetched from outside."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.headings, self.plots, self.fetched = "", [""], 0, list[str]()
        self.inside = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        given = dict(attrs)
        self.plots += "plotly-graph-div" in (given.get("class") or "")
        self.fetched += [v for k, v in given.items() if k in ("src", "href") and v]
        if tag == "h2":
            self.headings.append("")

    def handle_data(self, data: str) -> None:
        if self.inside == "h2":
            self.headings[-1] += data
        if self.inside not in ("script", "style"):
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def test_a_whole_run_shows_every_plot_and_fetches_nothing(tmp_path: Path) -> None:
    page = Page(write_report(whole_run(tmp_path, metrics())))
    assert page.plots == 6
    assert page.fetched == []
    assert "Not run yet" not in page.text
    for figure in ("60.0%", "62.5%", "1.52×", "20/20", "20.80", "AMD EPYC", "ab" * 32):
        assert figure in page.text, figure


def test_what_the_config_says_is_shown_as_text_not_run(tmp_path: Path) -> None:
    path = write_report(whole_run(tmp_path, metrics()))
    assert "<script>alert(1)" not in path.read_text()
    assert "<script>alert(1)</script>" in Page(path).text


def test_the_plotting_library_is_in_the_page_once(tmp_path: Path) -> None:
    text = write_report(whole_run(tmp_path, metrics())).read_text()
    assert len(re.findall(r"plotly\.js v\d", text)) == 1


def test_the_gates_verdict_and_reasons_come_first_and_texts_are_escaped(tmp_path: Path) -> None:
    page = write_report(whole_run(tmp_path, metrics())).read_text()
    body = page[page.index("<main>") :]
    verdict = body.index("The gate says DO NOT SHIP (1 of 6 checks failed, profile legal)")
    reason = body.index("failed: loss on &#39;rare&#39;: +0.470 nats a token")
    assert verdict < reason < body.index("<table>")
    assert "loss [rare]" in body
    assert "&lt;script&gt;alert(1)" in body
    assert "<script>alert" not in page


@pytest.mark.parametrize("stage", ["train", "shrink", "export", "verify", "bench"])
def test_a_stage_not_run_yet_is_named_with_its_command(tmp_path: Path, stage: str) -> None:
    figures = metrics()
    del figures[stage]
    page = Page(write_report(whole_run(tmp_path, figures)))
    (said,) = re.findall("Not run yet: (.*)", page.text)
    assert set(re.findall(r"atp-edge (\w+)", said)) == {stage}


def test_an_empty_folder_still_has_a_page_that_says_what_to_run(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert page.plots == 0
    for stage in ("train", "shrink", "export", "verify", "bench"):
        assert f"atp-edge {stage}" in page.text


def test_a_model_that_got_slower_is_not_called_faster() -> None:
    figures = metrics()
    figures["bench"]["ratios"] |= {"token_ms_p50": 0.8, "first_token_ms": 1.2}
    said = dict(cards(figures))
    assert said["0.80×"] == "the dense speed per token"
    assert said["1.20×"] == "the dense speed to the first token"


def test_figures_of_rows_together_say_how_many() -> None:
    figures = metrics()
    figures["bench"]["settings"]["batch"] = 8
    said = [text for _, text in cards(figures)]
    assert "the dense speed per token, batch 8" in said
    chart = bench_figure(figures)
    assert chart is not None
    assert "batch 8" in chart.layout.yaxis.title.text
    assert "per token, p50, batch 8" in {row.name for row in rows_of(figures)}


def test_one_provider_that_fails_is_said_at_the_top() -> None:
    figures = metrics()
    proofs = figures["verify"]["providers"]
    passed = proofs["CPUExecutionProvider"]
    proofs["CUDAExecutionProvider"] = passed | {"passed": False, "greedy_same": 13}
    assert dict(cards(figures))["13/20"].startswith("FAILED: ")


def test_rows_compare_dense_and_slim() -> None:
    rows = {row.name: row for row in rows_of(metrics())}
    assert rows["perplexity"].dense == "13.00"
    assert rows["perplexity"].change == "62.5% recovered"
    assert rows["decoder parameters"].change == "60.0% kept"
    assert rows["per token, p50"].change == "1.52x"
    assert rows_of({}) == []
    assert [row.name for row in rows_of({"train": metrics()["train"]})] == ["perplexity"]


def test_the_table_fits_80_columns_and_the_readme_shows_the_same_figures() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(metrics()))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    for row in rows_of(metrics()):
        assert row.name in shown
        assert row.dense in shown
        assert row.change in shown
