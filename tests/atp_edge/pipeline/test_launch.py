"""Two processes by torchrun make the run that one process makes, through a kill too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from atp_edge.config import Config, TrainConfig
from atp_edge.pipeline.launch import _start, check_ranks
from atp_edge.pipeline.stages import run_stages
from atp_edge.run import ranks
from atp_edge.run.history import read_history
from atp_edge.run.pinned import SOURCES, pinned_settings
from atp_edge.settings import configured
from tests.tiny import QUICK_TO_TRAIN, Silent

WORKER = Path(__file__).with_name("launched.py")
SETTINGS: dict[str, Any] = QUICK_TO_TRAIN | {
    "steps": 8, "train.batch_blocks": 2, "train.micro_blocks": 1, "train.save_every": 2,
    # Their sums in another order part two runs by more than rounding, once Adam has divided.
    "recovery.reconstruct_blocks": 0, "recovery.approach_blocks": 0,
}  # fmt: skip

FROZEN: dict[str, Any] = {"recovery.retrain": False, "lora.lr": 1e-4}
"""What can be shared out: LoRA alone is tuned. Adam makes of a small gradient's last bits a share
of its rate: at 1e-3, LoRA of runs whose sums differ in their order lies 2e-5 apart."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, source: Path) -> dict[str, str]:
    """Answers of very different lengths: the ranks' rows have uneven numbers of labels."""
    data = tmp_path_factory.mktemp("text") / "data.jsonl"
    rows = [json.loads(line)["text"] for line in (source / "data.jsonl").open()]
    cut = (1500, 60, 700)
    parted = [(text[: cut[i % 3]], text[cut[i % 3] : 1600]) for i, text in enumerate(rows)]
    lines = [json.dumps({"prompt": a, "completion": b or "None."}) for a, b in parted]
    data.write_text("\n".join(lines))
    return {"model": str(source / "model"), "data": str(data)}


@pytest.fixture(scope="module")
def alone(answers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    run_stages(configured(SETTINGS | answers | {"out": str(out)}), ("train",), Silent())
    return out


def launch(fault: str, values: dict[str, Any], out: Path) -> subprocess.CompletedProcess[str]:
    given = SETTINGS | values | {"out": str(out)}
    flags = [word for key, value in given.items() for word in said(key, value)]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # fmt: skip
    return subprocess.run(
        [sys.executable, *torchrun, str(WORKER), fault, "train", *flags],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


def said(key: str, value: Any) -> list[str]:
    """A setting on the command line."""
    flag = key.replace(".", "-").replace("_", "-")
    if str(value).lower() in ("true", "false"):
        return [f"--{flag}" if str(value).lower() == "true" else f"--no-{flag}"]
    return [f"--{flag}", str(value)]


def apart(one: Path, other: Path) -> float:
    """Largest difference of any weight or factor that training left."""
    a, b = (load_file(run / "checkpoint/tuned.safetensors") for run in (one, other))
    if {k: v.shape for k, v in a.items()} != {k: v.shape for k, v in b.items()}:
        return float("inf")
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_two_ranks_make_what_one_makes_though_one_is_killed_and_one_drifts(
    alone: Path, answers: dict[str, str], tmp_path: Path
) -> None:
    killed = launch("killed", answers, tmp_path / "two")
    assert killed.returncode != 0
    assert "another rank has ended" in killed.stderr
    assert "please report" not in killed.stderr
    assert (tmp_path / "two/dense/config.json").exists()
    assert not (tmp_path / "two/plan.json").exists()
    gone_on = launch("apart", answers, tmp_path / "two")
    assert gone_on.returncode == 0, gone_on.stderr
    same_run(alone, tmp_path / "two")
    a, b = (
        json.loads((run / "metrics.json").read_text())["train"] for run in (alone, tmp_path / "two")
    )
    assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-6)
    assert len(a["block_losses"]["slim"]) == len(b["block_losses"]["slim"])


@pytest.fixture(scope="module")
def lora_alone(answers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process in which the base is frozen."""
    out = tmp_path_factory.mktemp("runs") / "lora-alone"
    run_stages(configured(SETTINGS | answers | FROZEN | {"out": str(out)}), ("train",), Silent())
    return out


def test_frozen_weights_shared_out_make_what_one_process_makes(
    lora_alone: Path, answers: dict[str, str], tmp_path: Path
) -> None:
    shared = answers | FROZEN | {"train.shard": "true"}
    killed = launch("killed", shared, tmp_path / "two")
    assert killed.returncode != 0
    assert "another rank has ended" in killed.stderr
    gone_on = launch("watched", shared, tmp_path / "two")
    assert gone_on.returncode == 0, gone_on.stderr
    # Rank 1 holds less than the projections of its two models, and between steps no matrix whole.
    assert "held whole between steps: 0" in gone_on.stdout + gone_on.stderr
    same_run(lora_alone, tmp_path / "two")


def same_run(one: Path, other: Path) -> None:
    """The same decision, weights within 1e-5, losses within 1e-6 of their size (fp32 holds one of
    11 to 1e-6)."""
    plans = [json.loads((run / "plan.json").read_text()) for run in (one, other)]
    assert plans[0] == plans[1]
    assert apart(one, other) <= 1e-5
    losses = zip(read_history(one), read_history(other), strict=True)
    assert max(abs(a.loss - b.loss) / a.loss for a, b in losses) <= 1e-6


@pytest.mark.large
@pytest.mark.parametrize("shard", [False, True])
def test_without_rank_0s_decision_the_ranks_part(
    alone: Path, lora_alone: Path, answers: dict[str, str], tmp_path: Path, shard: bool
) -> None:
    more = FROZEN | {"train.shard": "true"} if shard else {}
    ended = launch("unguarded", answers | more, tmp_path / "two")
    assert ended.returncode != 0 or apart(lora_alone if shard else alone, tmp_path / "two") > 1e-3


@pytest.mark.large
@pytest.mark.parametrize("shard", [False, True])
def test_the_closed_form_steps_add_up_over_ranks(
    answers: dict[str, str], tmp_path: Path, shard: bool
) -> None:
    on: dict[str, Any] = {"recovery.reconstruct_blocks": 4, "recovery.approach_blocks": 4}
    more = FROZEN | {"recovery.approach_blocks": 4} if shard else on
    out = tmp_path / "alone"
    run_stages(configured(SETTINGS | answers | more | {"out": str(out)}), ("train",), Silent())
    shared = {"train.shard": "true"} if shard else {}
    ended = launch("none", answers | more | shared, tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    losses = zip(read_history(out), read_history(tmp_path / "two"), strict=True)
    assert max(abs(a.loss - b.loss) / a.loss for a, b in losses) <= 1e-6


def test_blocks_that_do_not_share_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "size", lambda: 3)
    with pytest.raises(ValueError, match=r"batch_blocks = 4 on 3 ranks.*--train-batch-blocks 3"):
        check_ranks(Config(train=TrainConfig(batch_blocks=4)))
    with pytest.raises(ValueError, match=r"8 on 3 ranks.*--train-batch-blocks 6"):
        check_ranks(Config(train=TrainConfig(batch_blocks=8)))
    with pytest.raises(ValueError, match=r"batch_blocks = 6 on 4 ranks.*--train-batch-blocks 4"):
        check_ranks(Config(train=TrainConfig(batch_blocks=6)), 4)
    check_ranks(Config(train=TrainConfig(batch_blocks=6)))


def test_ranks_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = [{"torch's version": "2.13.0"}, {"torch's version": "2.12.0"}]
    monkeypatch.setattr(ranks, "of_all", lambda _: theirs)
    with pytest.raises(ValueError, match=r"torch's version: rank 0 has 2\.13\.0, rank 1 has 2\.12"):
        ranks.check_same(theirs[0])


def test_a_setting_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the hash of them all."""

    def started(seed: int) -> dict[str, Any]:
        files = {kind: {"files": {}} for kind in SOURCES}
        inputs = {"settings": pinned_settings(configured({"seed": seed})), **files}
        monkeypatch.setattr("atp_edge.pipeline.inputs.inputs_of", lambda _: inputs)
        return _start(configured({}))

    theirs = [started(0), started(7)]
    monkeypatch.setattr(ranks, "of_all", lambda _: theirs)
    with pytest.raises(ValueError, match=r"^seed: rank 0 has 0, rank 1 has 7; expected the same"):
        ranks.check_same(theirs[0])


def test_a_step_in_parts_is_the_step_as_a_whole(
    alone: Path, answers: dict[str, str], tmp_path: Path
) -> None:
    """One block at a time or both at once, but for rounding."""
    whole = SETTINGS | answers | {"train.micro_blocks": 0, "out": str(tmp_path / "whole")}
    run_stages(configured(whole), ("train",), Silent())
    losses = zip(read_history(alone), read_history(tmp_path / "whole"), strict=True)
    assert max(abs(a.loss - b.loss) / a.loss for a, b in losses) <= 1e-5
