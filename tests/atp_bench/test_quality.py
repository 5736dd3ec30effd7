"""The quality matrix on a tiny model: cells, resuming, and what is shown."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from atp_bench.quality.ablations import ablations, ablations_tables
from atp_bench.quality.acceptance import Claim, claims
from atp_bench.quality.cells import IMPORTANCE, LAYERS, METHODS, Cell, matrix
from atp_bench.quality.intervals import Measured, lead_over, recovery_of
from atp_bench.quality.report import document, markdown, page, tables
from atp_bench.quality.results import Result, read_results, write_results
from atp_bench.quality.runner import run_matrix
from atp_bench.quality.summary import Summary, summarize
from rich.console import Console
from typer.testing import CliRunner

from atp_edge.cli import app
from atp_edge.config import Config, with_values
from atp_edge.pipeline.train import train
from atp_edge.run.files import file_lock
from atp_edge.run.folder import RunFolder
from tests.tiny import QUICK_TO_TRAIN, Silent, dense_run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, real_folder: Path) -> Config:
    return dense_run(tmp_path_factory.mktemp("quality"), real_folder, **QUICK_TO_TRAIN).config()


def cell(method: str, base: Config, share: float = 0.6) -> Cell:
    return Cell(method=method, domain=base.data, seed=0, share=share, widths="per-layer", steps=4)


def test_a_matrix_shares_its_dense_baseline_and_goes_on_where_it_was(
    base: Config, tmp_path: Path
) -> None:
    cells = [cell(name, base) for name in ("atp", "two-stage: flap", LAYERS)]
    file = tmp_path / "results.json"
    first = Silent()
    run_matrix(cells[:1], work=tmp_path / "work", results=file, progress=first, base=base, items=8)
    second = Silent()
    changed = with_values(base, {"decision.penalty": 4.0})  # of no matter to a dense model
    both = run_matrix(
        cells, work=tmp_path / "work", results=file, progress=second, base=changed, items=8
    )
    assert cells[0].key in first.said
    assert cells[0].key not in second.said
    assert not any("dense" in said for said in second.said), "the baseline was tuned twice"
    assert [r.cell for r in both] == cells
    assert both[0].dense_perplexity == both[1].dense_perplexity
    assert {r.tokens for r in both} == {4 * 32}
    assert all(0.3 < r.decoder_share <= 0.6 for r in both)
    assert all(set(r.tasks["tasks"]) >= {"continuation", "clause"} for r in both)
    assert read_results(file)[cells[0].key] == both[0]
    assert [p.name[:5] for p in (tmp_path / "work").glob("[!.]*")] == ["dense"]


def test_processes_share_a_matrix_cell_by_cell(base: Config, tmp_path: Path) -> None:
    taken, free = cell("atp", base), cell("two-stage: flap", base)
    work, file, progress = tmp_path / "work", tmp_path / "results.json", Silent()

    def made() -> list[Result]:
        return run_matrix(
            [taken, free], work=work, results=file, progress=progress, base=base, items=4
        )

    with file_lock(work / taken.key.replace("/", "_")):
        assert [r.cell for r in made()] == [free]
    assert progress.said[0] == f"{taken.key}: another process is at it"
    assert [r.cell for r in made()] == [taken, free]


def test_a_kept_run_is_scored_by_more_items_and_blocks_and_not_trained_again(
    base: Config, tmp_path: Path
) -> None:
    file, progress = tmp_path / "results.json", Silent()

    def scored(items: int, blocks: int = 2, keep: bool = False) -> Result:
        run_matrix(
            [cell("atp", base)], work=tmp_path / "work", results=file, progress=progress,
            base=base, items=items, blocks=blocks, keep=keep,
        )  # fmt: skip
        (result,) = read_results(file).values()
        return result

    few = scored(4, keep=True)
    (folder,) = (tmp_path / "work").glob("atp_*")
    progress.said.clear()
    run = RunFolder(folder)
    train(run.config(), run, progress)
    assert progress.said == ["reading the domain text"], "a kept run is a run that is trained"
    assert run.metrics()["train"]["recovery"] == few.recovery
    progress.said.clear()
    wider = scored(4, blocks=5, keep=True)
    assert progress.said == [few.cell.key, "testing on more blocks"]
    assert len(wider.block_losses) == len(wider.dense_block_losses) == 5
    assert wider.recovery == wider.dense_perplexity / wider.perplexity != few.recovery
    assert (wider.tasks, wider.items) == (few.tasks, 4)
    assert wider.beside(wider)
    assert not wider.beside(few)
    progress.said.clear()
    more = scored(8)
    assert progress.said == [few.cell.key, "testing on more blocks", "scoring the tasks"]
    assert replace(wider, tasks=more.tasks, items=8) == more, "by more, never by less"
    assert few.tasks != more.tasks
    assert scored(16).items == 8, "its run is gone"


def test_every_preset_names_known_methods_and_the_quick_one_is_small() -> None:
    for preset in ("quick", "cpu", "gpu"):
        for made in matrix(preset):  # type: ignore[arg-type]
            made.config(Config())
        assert len(set(matrix(preset))) == len(matrix(preset))  # type: ignore[arg-type]
    assert len(matrix("quick")) == 2
    assert {c.method for c in matrix("cpu")} >= set(METHODS)
    longest = max(c.config(Config()).train_tokens for c in matrix("gpu"))
    assert longest >= 20_000_000


def test_an_unknown_method_is_named(base: Config) -> None:
    with pytest.raises(ValueError, match="method 'magic': expected one of atp, frozen"):
        cell("magic", base).config(base)


def results() -> list[Result]:
    def made(method: str, seed: int, perplexity: float) -> Result:
        return Result(
            cell=Cell(method=method, domain="legal", seed=seed, share=0.6, widths="per-layer",
                      steps=200),
            dense_perplexity=12.0,
            perplexity_at_freeze=40.0,
            perplexity=perplexity,
            recovery=12.0 / perplexity,
            tasks={"average": 0.9},
            decoder_share=0.6,
            whole_share=0.68,
            tokens=102_400,
            seconds=1.0,
        )  # fmt: skip

    return [made("atp", 0, 20.0), made("atp", 1, 24.0), made("two-stage: group-taylor", 0, 30.0)]


def test_some_cells_are_shown_with_the_promises_they_say_something_of(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_results(file, {r.cell.key: r for r in results()})

    def shown(*only: str) -> str:
        asked = ["bench", "quality", "--show", "--json", str(file), *only]
        done = CliRunner().invoke(app, asked, catch_exceptions=False)
        return " ".join(done.output.split())

    assert "not measured" in shown()
    atp = shown("--only", "atp/legal/0")
    assert "0.600 │ 0.600 │ 1 │ yes" in atp
    assert "not measured" not in atp
    assert "promised" not in shown("--only", "group-taylor/legal/0")


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

    def shown(*asked: str) -> Any:
        return CliRunner().invoke(app, ["bench", "quality", *asked])

    both = ["--json", str(cpu), "--json", str(gpu)]
    report = tmp_path / "report.md"
    assert shown("--show", *both, "--report", str(report)).exit_code == 0
    assert "| 40 % cut, 20 M tokens: recovery | ≥ 0.85 | 0.900 |" in report.read_text()
    assert "line [0.600, 0.900]" in report.read_text()
    for asked, trouble in (
        (both, f"--json {gpu}: a matrix has one results file"),
        (["--show", "--json", str(tmp_path / "none.json")], "none.json: no results to show"),
        (
            ["--show", *both, "--only", "health"],
            "no cell matches --only ['health']; of 2 the nearest",
        ),
    ):
        refused = shown(*asked)
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


def claim(results: list[Result], ending: str) -> Claim:
    return next(c for c in claims(results) if c.text.endswith(ending))


def values(claim: Claim) -> tuple[float, ...]:
    return tuple(m.value for m in claim.measured)


def test_a_promise_is_held_by_its_lowest_cell_or_not_at_all() -> None:
    found = results()
    assert values(claim(found, "0.1 M tokens: recovery")) == (0.6, 0.5)
    assert claim(found, "0.1 M tokens: recovery").verdict == "no"
    assert claim(found[:1], "0.1 M tokens: recovery").verdict == "yes"
    assert claim(found, "0.8 M tokens: recovery").verdict == "not measured"


def test_a_rival_is_compared_on_its_own_data_and_seed_alone() -> None:
    lead = claim(results(), "two-stage way")
    assert values(lead) == pytest.approx((0.2,))
    assert lead.verdict == "yes"
    by_ours = [replace(r, cell=replace(r.cell, method=IMPORTANCE)) for r in results()[:1]]
    assert claim(results() + by_ours, "two-stage way") == lead, "our own score is not the field's"
    assert values(claim(results() + by_ours, "our own importance")) == (0.0,)
    twin = [replace(r, cell=replace(r.cell, method="frozen")) for r in results()[:2]]
    assert values(claim(results() + twin, "twin, frozen")) == (0.0, 0.0)
    assert claim(results() + twin, "twin, frozen").verdict == "no", "a twin must be beaten"


@pytest.mark.parametrize(
    ("rival_losses", "verdict"),
    [
        ((3.02, 3.13, 3.22, 3.35), "yes"),  # worse in every block
        ((2.9, 3.2, 3.1, 3.24), "tie"),  # worse here, better there
        ((2.98, 3.07, 3.18, 3.25), "no"),
    ],
)
def test_twins_are_compared_block_by_block(rival_losses: tuple[float, ...], verdict: str) -> None:
    def with_losses(result: Result, losses: tuple[float, ...]) -> Result:
        mean = sum(losses) / 4
        return replace(
            result,
            dense_perplexity=math.exp(2.5),
            perplexity=math.exp(mean),
            recovery=math.exp(2.5 - mean),
            block_losses=losses,
            dense_block_losses=(2.5, 2.4, 2.6, 2.5),
        )

    ours = with_losses(results()[0], (3.0, 3.1, 3.2, 3.3))
    twin = with_losses(replace(ours, cell=replace(ours.cell, method="frozen")), rival_losses)
    lead = claim([ours, twin], "twin, frozen")
    (measured,) = lead.measured
    assert measured.interval
    assert measured.interval[0] <= measured.value <= measured.interval[1]
    assert lead.verdict == verdict
    beside_a_better_dense = replace(twin, dense_perplexity=math.exp(2.4), recovery=math.exp(-0.7))
    assert lead_over(ours, beside_a_better_dense) == lead_over(ours, twin)


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
    assert claim([even], "0.1 M tokens: recovery").lowest == shown
    assert shown.interval_text in document([even])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*tables(summarize([even])))
    assert shown.interval_text in console.export_text()


def test_tasks_are_judged_over_the_seeds_of_a_domain() -> None:
    first, second = results()[:2]

    def scored(result: Result, average: float, domain: str = "legal") -> Result:
        tasks = {"average": average, "interval": [average - 0.08, average + 0.06]}
        return replace(result, cell=replace(result.cell, domain=domain), tasks=tasks)

    seeds = [scored(first, 0.88), scored(second, 0.96)]
    legal, health = claim([*seeds, scored(first, 0.95, "health")], "0.1 M tokens: tasks").measured
    assert (legal.value, health.value) == pytest.approx((0.92, 0.95))
    assert legal.interval == pytest.approx((0.92 - 0.08 / 2**0.5, 0.92 + 0.06 / 2**0.5))
    assert claim(seeds, "0.1 M tokens: tasks").verdict == "yes"
    assert claim(seeds[:1], "0.1 M tokens: tasks").verdict == "no"


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
