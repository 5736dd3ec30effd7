"""`atp-edge bench losses` on tiny models: tokens that add up, sites that answer for themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from atp_bench.loss_map import site_losses, token_kinds
from transformers import AutoTokenizer
from typer.testing import CliRunner

from atp_edge.cli import app
from atp_edge.data.blocks import Blocks
from atp_edge.evaluation.text_loss import text_loss
from atp_edge.model.checkpoint import load_narrow, save_narrow
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import narrow_model
from atp_edge.model.plan import Plan, plan_of, read_plan, write_plan
from atp_edge.model.structures import sites_of
from atp_edge.run.folder import RunFolder
from tests.tiny import dense_run, record, tiny_model


def cut_at(model: torch.nn.Module, layer: int, kind: str) -> Plan:
    """A plan that keeps half of one site, and all of the others."""
    shape = model_shape(model.config)  # type: ignore[arg-type]
    cut = (layer, kind)
    return plan_of(
        shape,
        [
            tuple(range(s.size // 2 if (s.layer, s.kind) == cut else s.size))
            for s in sites_of(shape)
        ],
    )


def test_a_site_answers_for_its_own_cut_and_no_other() -> None:
    dense = tiny_model("llama")
    slim = narrow_model(dense, cut_at(dense, 1, "mlp"))
    ids = torch.randint(0, dense.config.vocab_size, (2, 24), generator=torch.Generator())
    blocks = Blocks(input_ids=ids, labels=ids)
    found = site_losses(dense, slim, blocks)
    whole = text_loss(slim, blocks).mean - text_loss(dense, blocks).mean
    assert abs(whole) > 1e-4
    assert found.pop((1, "mlp")) == pytest.approx(whole, abs=1e-7)
    assert all(loss == pytest.approx(0, abs=1e-7) for loss in found.values())


def test_every_token_is_of_one_kind_and_a_repeated_pair_is_found() -> None:
    train = Blocks(input_ids=torch.tensor([[5, 5, 7]]), labels=torch.zeros(1, 3))
    ids = torch.tensor([[5, 7, 9, 5, 7, 7], [7, 5, 7, 5, 5, 5]])
    kinds = token_kinds(train, Blocks(input_ids=ids, labels=ids))
    for parts in kinds.values():
        assert torch.equal(sum(part.int() for part in parts.values()), torch.ones(2, 5).int())
    assert kinds["occurs in the train text"]["0 times"].tolist()[0] == [False, True, *[False] * 3]
    again = kinds["after the token before it"]["again"]
    assert again.tolist() == [[False, False, False, True, False], [False, False, True, False, True]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, real_folder: Path) -> RunFolder:
    """A run as training leaves it, of an untrained model."""
    folder = tmp_path_factory.mktemp("losses")
    run = dense_run(folder, real_folder, **{"dataset.block_tokens": 64, "dataset.test_blocks": 3})
    write_plan(cut_at(load_narrow(run.dense), 0, "attention"), run.plan)
    record(run, "train")
    return run


def test_the_command_shows_tokens_and_sites_that_add_up(run: RunFolder, tmp_path: Path) -> None:
    file = tmp_path / "losses.json"
    command = ["bench", "losses", "--out", str(run.path), "--json", str(file)]
    runner = CliRunner(env={"COLUMNS": "80"})
    with pytest.raises(ValueError, match="slim is not there; write it with `atp-edge shrink --out"):
        runner.invoke(app, command, catch_exceptions=False)
    tokenizer = AutoTokenizer.from_pretrained(run.dense)
    save_narrow(narrow_model(load_narrow(run.dense), read_plan(run.plan)), tokenizer, run.slim)
    record(run, "shrink")
    result = runner.invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    found = json.loads(file.read_text())
    for by in {kind["by"] for kind in found["kinds"]}:
        kinds = [kind for kind in found["kinds"] if kind["by"] == by]
        assert sum(kind["share"] for kind in kinds) == pytest.approx(1)
        assert sum(kind["share_of_loss"] for kind in kinds) == pytest.approx(1)
        mean = sum(kind["share"] * kind["slim"] for kind in kinds)
        assert mean == pytest.approx(found["slim"], rel=1e-4)
    assert {(s["layer"], s["kind"]): s["kept"] for s in found["sites"]}[0, "attention"] == 1 / 3
    assert sum(s["loss"] != 0 for s in found["sites"]) == 1
