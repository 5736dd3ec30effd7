"""`--protect`: a text that must not lose enters the decision's loss and importance."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from atp_edge.config import Config
from atp_edge.data.blocks import Blocks
from atp_edge.decision.generator import DecisionGenerator
from atp_edge.decision.importance import starting_logits
from atp_edge.evaluation.scoring import TorchModel
from atp_edge.gate.measured_text import measure, texts_of
from atp_edge.model.checkpoint import load_narrow, save_narrow
from atp_edge.pipeline.stages import run_stages
from atp_edge.run.folder import RunFolder, open_run
from atp_edge.settings import configured, with_values
from atp_edge.training.learners import JointLearner
from atp_edge.training.setup import splits_of
from tests.atp_edge.decision.test_importance import importance_to
from tests.atp_edge.gate.taught import document, taught, tokenizer
from tests.tiny import BLOCKS, Silent, feasible_of, lora_model

ALL, OWN = BLOCKS.rows(list(range(12))), BLOCKS.rows(list(range(12, 24)))


def learner(protected: Blocks | None, **settings: Any) -> JointLearner:
    """On half of the blocks, its importance measured on them; the other half may be protected."""
    values: dict[str, Any] = {"steps": 12, "train.precision": "no", "decision.control_share": 1.0}
    model = lora_model()
    feasible = feasible_of(model)
    scores = importance_to(model, ALL)
    torch.manual_seed(0)
    generator = DecisionGenerator(feasible.sites, starting_logits(scores, feasible))
    return JointLearner(
        model, generator, feasible, ALL, ALL, with_values(Config(), values | settings),
        Accelerator(cpu=True), importance=scores, protected=protected,
    )  # fmt: skip


def test_the_importance_follows_what_is_protected_and_the_loss_that_is_told_does_not() -> None:
    plain, own = learner(None), learner(OWN, **{"decision.protect_share": 0.9})
    wanted = torch.cat(importance_to(lora_model(), OWN))
    told = [[made.step(i).decision_loss for i in range(6)] for made in (plain, own)]
    assert told[0][0] == pytest.approx(told[1][0]), "the same batch, before any step"
    assert plain.importance is not None
    assert own.importance is not None
    near, far = (
        float(torch.dist(torch.cat(made.importance).log(), wanted.log())) for made in (own, plain)
    )
    assert near < far


def test_a_share_of_none_is_no_protection() -> None:
    plain, none = learner(None), learner(OWN, **{"decision.protect_share": 0.0})
    for i in range(4):
        plain.step(i)
        none.step(i)
    for a, b in zip(plain.generator.parameters(), none.generator.parameters(), strict=True):
        torch.testing.assert_close(a, b)


# A whole run


def words(seed: str) -> list[str]:
    draw = random.Random(seed)
    return [
        "".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(2))
        for _ in range(30)
    ]


THINGS, PRICES, NAMES = words("things"), words("prices"), words("names")


def sentences(kind: str, count: int, seed: int) -> list[str]:
    """Facts of two kinds: what a thing costs, and who comes after whom."""
    draw = random.Random(f"{kind} {seed}")
    told = (
        [f"{a} costs {b}." for a, b in zip(THINGS, PRICES, strict=True)]
        if kind == "shop"
        else [f"After {NAMES[i - 1]} comes {NAMES[i]}." for i in range(30)]
    )
    return [" ".join(draw.choice(told) for _ in range(6)) for _ in range(count)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows both kinds, text in which one is rare, and text of that to protect."""
    folder = tmp_path_factory.mktemp("protect")
    (folder / "protect.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in sentences("after", 60, 4))
    )
    rows = sentences("shop", 400, 3) + sentences("after", 12, 3)
    (folder / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows))
    return folder


def settings(source: Path, out: Path, **values: Any) -> Config:
    named = {
        "model": str(source / "model"), "data": str(source / "data.jsonl"), "out": str(out),
        "steps": 60, "dataset.block_tokens": 64, "dataset.test_blocks": 8, "lora.rank": 4,
        "train.precision": "no", "decision.width_multiple": 4, "decision.importance_blocks": 8,
        "recovery.reconstruct_blocks": 8, "recovery.approach_blocks": 8,
    }  # fmt: skip
    return configured(named | values)


def test_what_is_protected_is_pinned_and_checked(source: Path, tmp_path: Path) -> None:
    from atp_edge.pipeline.inputs import inputs_of

    if not (source / "model").exists():
        save_narrow(taught(sentences("shop", 20, 0), 2), tokenizer(), source / "model")
    file = source / "protect.jsonl"
    plain = settings(source, tmp_path / "run")
    own = replace(plain, protect=str(file))
    open_run(own, inputs_of(own))
    open_run(own, inputs_of(own))
    with pytest.raises(ValueError, match="with --protect there, without it here"):
        open_run(plain, inputs_of(plain))
    before = file.read_text()
    file.write_text(before + "\n" + json.dumps({"text": "more"}))
    with pytest.raises(ValueError, match=r"the protect of .*protect\.jsonl changed"):
        open_run(own, inputs_of(own))
    file.write_text(before)
    with pytest.raises(ValueError, match=r"nowhere\.jsonl"):
        inputs_of(replace(own, protect="nowhere.jsonl"))
    whole = with_values(own, {"decision.protect_share": 1})
    with pytest.raises(ValueError, match=r"protect_share = 1\.0: expected less than 1"):
        splits_of(whole)


@pytest.mark.large
def test_a_rare_slice_loses_half_as_much_beyond_the_average(source: Path, tmp_path: Path) -> None:
    """Mean of three seeds; the average stays within a tenth of a nat."""
    model = taught([*sentences("shop", 200, 0), *sentences("after", 200, 0)], 600)
    save_narrow(model, tokenizer(), source / "model")
    documents = [
        document(text, kind) for kind in ("shop", "after") for text in sentences(kind, 100, 5)
    ]
    texts = texts_of(documents, tokenizer(), most=400, tokens=64, seed=0)
    excess: dict[bool, list[float]] = {False: [], True: []}
    average: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(3):
        for own in (False, True):
            protect = str(source / "protect.jsonl") if own else ""
            out = tmp_path / f"{seed}-{own}"
            run_stages(settings(source, out, seed=seed, protect=protect), ("train", "shrink"),
                       Silent())  # fmt: skip
            run = RunFolder(out)
            found = measure(
                TorchModel(load_narrow(run.dense)), TorchModel(load_narrow(run.slim)), texts
            )
            rise, of = found.by_text(found.nats[1] - found.nats[0]), np.array(found.slices)
            shop, after = (
                rise[of == kind].sum() / found.tokens[of == kind].sum()
                for kind in ("shop", "after")
            )
            mean = (400 * shop + 12 * after) / 412  # as the data has them
            excess[own].append(float(after - mean))
            average[own].append(float(mean))
    assert np.mean(excess[True]) < np.mean(excess[False]) / 2, (excess, average)
    assert np.mean(average[True]) < np.mean(average[False]) + 0.1, (excess, average)
