"""The quality matrix on a tiny model: shared baselines, resuming, scoring again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from atp_bench.quality.cells import LAYERS, Cell
from atp_bench.quality.results import Result, read_results
from atp_bench.quality.runner import run_matrix

from atp_edge.config import Config
from atp_edge.evaluation.text_loss import perplexity
from atp_edge.pipeline.train import train
from atp_edge.run.files import file_lock
from atp_edge.run.folder import RunFolder
from atp_edge.settings import with_values
from atp_edge.training.narrow_state import load_narrow_peft
from atp_edge.training.setup import splits_of
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
    trained = run.metrics()["train"]
    assert progress.said == [
        "reading the domain text",
        "near copies of documents in other splits, or of what is protected, left out: 8",
        f"no adapter/: {trained['adapter']['why']}",
    ], "a kept run is a run that is trained"
    assert trained["recovery"] == few.recovery
    progress.said.clear()
    wider = scored(4, blocks=5, keep=True)
    assert progress.said == [few.cell.key, "testing on more blocks"]
    assert len(wider.block_losses) == len(wider.dense_block_losses) == 5
    assert wider.recovery == wider.dense_perplexity / wider.perplexity != few.recovery
    assert (wider.tasks, wider.items) == (few.tasks, 4)
    # Every figure that is compared is of the same blocks: the freeze, too.
    test = splits_of(with_values(base, {"dataset.test_blocks": 5})).test
    frozen = load_narrow_peft(run.config(), run, "frozen")
    assert wider.perplexity_at_freeze == pytest.approx(perplexity(frozen, test), rel=1e-6)
    assert wider.perplexity_at_freeze != few.perplexity_at_freeze
    assert wider.beside(wider)
    assert not wider.beside(few)
    progress.said.clear()
    more = scored(8)
    assert progress.said == [few.cell.key, "testing on more blocks", "scoring the tasks"]
    assert replace(wider, tasks=more.tasks, items=8) == more, "by more, never by less"
    assert few.tasks != more.tasks
    assert scored(16).items == 8, "its run is gone"
