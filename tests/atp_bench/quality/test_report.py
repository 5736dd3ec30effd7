"""What is shown of results: tables, the page, the document, and the command that shows them."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from atp_bench.quality.ablations import ablations, ablations_tables
from atp_bench.quality.acceptance import criteria
from atp_bench.quality.cells import matrix
from atp_bench.quality.intervals import Measured, recovery_of
from atp_bench.quality.report import document, markdown, page, tables
from atp_bench.quality.results import Result, read_results, write_results
from atp_bench.quality.summary import Summary, summarize
from rich.console import Console
from typer.testing import CliRunner

from atp_edge.cli import app
from atp_edge.config import Config
from tests.atp_bench.quality.example import results


def test_some_cells_are_shown_with_the_promises_they_say_something_of(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_results(file, {r.cell.key: r for r in results()})

    def shown(*only: str) -> str:
        arguments = ["bench", "quality", "--show", "--json", str(file), *only]
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        return " ".join(done.output.split())

    assert "not measured" in shown()
    atp = shown("--only", "atp/legal/0")
    assert "0.600 │ 0.600 │ 1 │ yes" in atp
    assert "not measured" not in atp
    assert "promised" not in shown("--only", "group-taylor/legal/0")


def test_little_text_has_a_table_of_its_own_and_keeps_no_promise() -> None:
    whole = results()
    little = [replace(r, cell=replace(r.cell, documents=30)) for r in whole]
    assert criteria(little) == criteria([])
    assert document(whole) == document([*whole, *little]).partition("## With little text")[0]
    assert "| 30 | 102,400 | legal | atp | 12.00 | 20.00 | 0.600 |" in document([*whole, *little])
    more = [replace(r, cell=replace(r.cell, documents=100), recovery=0.9) for r in whole]
    titles = [str(t.title) for t in tables(summarize([*more, *little]))]
    assert len(titles) == len(set(titles)), "a table each, whatever their order"
    assert "of 30 documents" in titles[0]


def test_results_of_several_machines_are_shown_together_and_a_matrix_has_one_file(
    tmp_path: Path,
) -> None:
    cpu, gpu = tmp_path / "cpu.json", tmp_path / "gpu.json"
    short, *_ = results()
    batched = replace(short.cell, steps=640, batch_blocks=64)
    long = replace(short, cell=batched, tokens=20_971_520, recovery=0.9)
    assert batched.key == "atp/legal/0/0.6/per-layer/640x64"
    assert batched.config(Config()).train_tokens == long.tokens
    assert batched in matrix("gpu")
    write_results(cpu, {short.cell.key: short})
    write_results(gpu, {batched.key: long})
    assert read_results(gpu)[batched.key].cell == batched

    def shown(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["bench", "quality", *arguments])

    both = ["--json", str(cpu), "--json", str(gpu)]
    report = tmp_path / "report.md"
    assert shown("--show", *both, "--report", str(report)).exit_code == 0
    assert "| 40 % cut, 20 M tokens: recovery | ≥ 0.85 | 0.900 |" in report.read_text()
    assert "line [0.600, 0.900]" in report.read_text()
    for arguments, trouble in (
        (both, f"--json {gpu}: a matrix has one results file"),
        (["--show", "--json", str(tmp_path / "none.json")], "none.json: no results to show"),
        (
            ["--show", *both, "--only", "health"],
            "no cell matches --only ['health']; of 2 the nearest",
        ),
    ):
        refused = shown(*arguments)
        assert isinstance(refused.exception, ValueError)
        assert trouble in str(refused.exception)


def test_summaries_are_over_seeds_and_the_best_comes_first() -> None:
    first, second = summarize(reversed(results()))
    assert (first.method, first.seeds, second.method) == ("atp", 2, "two-stage: group-taylor")
    assert first.recovery.value == pytest.approx((0.6 + 0.5) / 2)
    assert first.recovery_spread == (0.5, 0.6)
    assert first.lead is None
    assert second.lead == Measured(value=pytest.approx(0.6 - 0.4)), "of the one seed that both have"
    assert "| 0.900 | 0.200 |  |" in markdown([second])


def test_table_page_and_markdown_show_every_method() -> None:
    summaries: list[Summary] = summarize(results())
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*tables(summaries))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    assert "perplexity: legal, 40% cut, per-layer, 102,400 tokens" in shown
    for view in (" ".join(shown.split()), markdown(summaries), page(results())):
        assert "atp" in view
        assert "taylor" in view
    assert "| 102,400 | atp | 2 | 12.00 | 22.00 | 0.550 |  | 0.500 to 0.600 | 0.900 |" in document(
        results()
    )
    assert "http" not in page(results()).rsplit("</script>", 1)[-1]
    first, *others = results()
    elsewhere = replace(first, cell=replace(first.cell, domain="health"))
    apart = page([elsewhere, *others])
    assert "health: method" in apart
    assert "legal: method" in apart, "a domain's bars are its own"


def test_the_curve_by_tokens_is_over_the_same_seeds_at_every_length() -> None:
    first, *others = results()
    assert "mermaid" not in document([first, *others])
    longer = replace(
        first, cell=replace(first.cell, steps=800), tokens=409_600, perplexity=15.0, recovery=0.8
    )
    shown = document([longer, first, *others])
    assert 'title "legal, 40% cut, seed 0: recovery by tokens of training"' in shown
    assert 'x-axis ["0.1 M", "0.41 M"]' in shown
    assert "line [0.600, 0.800]" in shown
    assert "legal, 40% cut, seed 0" in page([longer, first, *others])
    most = replace(
        longer, cell=replace(longer.cell, batch_blocks=64), tokens=26_214_400, recovery=0.9
    )
    assert "line [0.600, 0.800, 0.900]" in document([longer, first, most])
    other_seed = replace(longer, cell=replace(longer.cell, seed=7))
    assert "mermaid" not in document([other_seed, first, *others]), "nothing to compare"


def test_a_recovery_tells_how_far_other_blocks_would_move_it() -> None:
    lost = [0.1, 0.3, 0.2, 0.2] * 10
    even = replace(
        results()[0],
        perplexity=12.0 * math.exp(0.2),
        recovery=math.exp(-0.2),
        block_losses=[2.5 + x for x in lost],
        dense_block_losses=[2.5] * 40,
    )
    shown = recovery_of(even)
    assert shown.interval
    low, high = shown.interval
    assert low < shown.value < high
    # The mean of 40 blocks that lose 0.2 with a deviation of 0.07: its standard error is 0.011.
    assert high - low == pytest.approx(2 * 1.96 * 0.011 * shown.value, rel=0.15)
    assert next(c for c in criteria([even]) if c.measured).lowest == shown
    assert shown.interval_text in document([even])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*tables(summarize([even])))
    assert shown.interval_text in console.export_text()


def test_each_part_is_told_by_what_the_default_leads_without_it() -> None:
    ours = results()[:2]

    def changed(part: str, seed: int, perplexity: float) -> Result:
        cell = replace(ours[seed].cell, method=part)
        return replace(ours[seed], cell=cell, perplexity=perplexity, recovery=12.0 / perplexity)

    rows = [
        *ours,
        changed("no regularizer", 0, 20.0),
        changed("LoRA alone", 0, 30.0),
        changed("LoRA alone", 1, 30.0),
        replace(changed("DoRA alone", 0, 24.0), cell=replace(ours[0].cell, method="DoRA alone",
                                                              steps=400)),
    ]  # fmt: skip
    first, second = ablations(summarize(rows))
    assert (first.method, first.seeds, second.method) == ("LoRA alone", 2, "no regularizer")
    assert first.recovery.value == pytest.approx(0.4)
    assert first.lead == Measured(value=pytest.approx((0.2 + 0.1) / 2))
    assert second.lead == Measured(value=0)
    shown = document(rows)
    assert "| LoRA alone | 2 | 0.400 | 0.900 | 0.150 |" in shown
    assert "| 102,400 | LoRA alone |" not in shown, "the methods' table is the methods'"
    assert "What each part buys" not in document(ours)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*ablations_tables([first, second]))
    table = console.export_text()
    assert max(map(len, table.splitlines())) <= 80
    assert "ATP with one part changed: legal, 40% cut, per-layer, 102,400 tokens" in table
