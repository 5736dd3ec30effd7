"""The gate: both models are asked everything, then every answer is judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atp_export.runtime.domain import DomainProfile

from atp_edge.config import Config
from atp_edge.evaluation.scoring import LanguageModel
from atp_edge.gate.answered import Answered, answer
from atp_edge.gate.bias import check_bias, gaps, unread_attributes
from atp_edge.gate.calibration import check_calibration
from atp_edge.gate.domain import check_fail_safe
from atp_edge.gate.flips import flips_of
from atp_edge.gate.forms import dense_model, shipped, window_of
from atp_edge.gate.integrity import check_integrity
from atp_edge.gate.material import Material, material_of
from atp_edge.gate.measured_text import measure
from atp_edge.gate.memorization import (
    check_canaries,
    check_extraction,
    check_personal_data,
    continuations,
    exposures,
    returned,
)
from atp_edge.gate.outside_tasks import check_outside
from atp_edge.gate.personal_data import leaked
from atp_edge.gate.prompts import Ask, check_prompts
from atp_edge.gate.quality import check_quality
from atp_edge.gate.refusals import check_refusals
from atp_edge.gate.results import Check, Flip, GateReport
from atp_edge.gate.settings import GateSettings, changed_of
from atp_edge.gate.tasks import check_tasks
from atp_edge.run.folder import RunFolder
from atp_edge.run.hashes import files_sha256
from atp_edge.training.setup import tokenizer_of


@dataclass(frozen=True, kw_only=True)
class Rivals:
    """The dense model and what ships, with what every check needs to ask them."""

    dense: LanguageModel
    slim: LanguageModel
    tokenizer: Any
    material: Material
    settings: GateSettings
    config: Config
    ask: Ask
    window: int
    """Tokens that both read."""


def judge(
    run: RunFolder,
    config: Config,
    settings: GateSettings,
    say: Callable[[str], None],
    exported: Path | None = None,
    *,
    as_stored: bool = False,
) -> tuple[GateReport, DomainProfile]:
    """The whole gate on a run whose files are as its stages wrote them, and the profile of its
    domain.

    exported: a folder that `export --to` wrote of the run, judged in place of the run's own.
    as_stored: how the dense model is held (see `dense_model`).
    Raises ValueError, before a model is loaded, for files that cannot be read.
    """
    began = time.perf_counter()
    folder = exported or run.path / settings.form
    tokenizer = tokenizer_of(config)
    say("reading what the gate asks")
    window = window_of(run, settings.form, folder)
    material = material_of(config, settings, tokenizer, window)
    dense = dense_model(run, as_stored=as_stored)
    slim, ask = shipped(folder, config, settings.form, settings.prompts.new_tokens)
    rivals = Rivals(
        dense=dense, slim=slim, ask=ask, tokenizer=tokenizer, material=material, settings=settings,
        config=config, window=window,
    )  # fmt: skip
    integrity = check_integrity(run, settings.form, folder)
    checks, flips, figures, notes = _answered(rivals, say)
    report = GateReport(
        profile=settings.profile,
        form=settings.form,
        level=settings.level,
        checks=(*integrity, *checks),
        figures=figures,
        flips=flips,
        files=files_sha256(folder.parent, [folder.name]) | files_sha256(run.path, ["dense"]),
        settings=asdict(settings),
        seconds=time.perf_counter() - began,
        notes=(*material.notes, *notes),
        undecided_fails=settings.undecided == "fail",
        changed=changed_of(settings),
    )
    return report, material.profile


def _answered(
    rivals: Rivals, say: Callable[[str], None]
) -> tuple[list[Check], tuple[Flip, ...], dict[str, Any], list[str]]:
    """Checks of all that both models are asked, the flips, the figures behind them, and notes."""
    material, settings = rivals.material, rivals.settings
    figures: dict[str, Any] = {}
    notes: list[str] = []
    documents = len(material.texts) + len(material.further)
    say(f"reading {documents} documents with both models")
    checks = _text(rivals, figures)
    say(f"answering {sum(len(task.items) for task in material.tasks)} items of the tasks")
    found, flips, items = _tasks(rivals, figures)
    checks += found
    if material.lm_eval:
        say(f"answering {len(material.lm_eval)} tasks of lm-eval")
        found, notes = check_outside(
            rivals.dense, rivals.slim, rivals.tokenizer, material.lm_eval, settings.tasks,
            settings.level, rivals.window,
        )  # fmt: skip
        checks += found
    say(f"comparing {len(material.pairs)} pairs of texts for bias")
    checks += _bias(rivals, figures)
    say("looking at prompts, memorization and refusals")
    found, said = check_prompts(material.rules, rivals.ask)
    checks += found
    prompted = list(zip([rule.prompt for rule in material.rules], said, strict=True))
    checks += _memorization(rivals, items, prompted, figures)
    checks += _refusals(rivals, items)
    checks += check_fail_safe(material.profile_errors)
    figures["fail_safe"] = material.profile_errors
    return checks, flips, figures, notes


def _text(rivals: Rivals, figures: dict[str, Any]) -> list[Check]:
    settings = rivals.settings
    texts, more = rivals.material.texts, rivals.material.further
    measured = measure(rivals.dense, rivals.slim, texts)
    further = measure(rivals.dense, rivals.slim, more) if more else None
    quality, figures["text"] = check_quality(
        measured, settings.quality, settings.level, further, rivals.material.unread
    )
    calibration, figures["calibration"] = check_calibration(
        measured, settings.calibration, settings.level, settings.quality.fewest_documents,
        rivals.config.seed,
    )  # fmt: skip
    return quality + calibration


def _tasks(
    rivals: Rivals, figures: dict[str, Any]
) -> tuple[list[Check], tuple[Flip, ...], list[Answered]]:
    settings = rivals.settings
    if not settings.tasks.items:
        return [], (), []
    items = answer(rivals.dense, rivals.slim, rivals.tokenizer, rivals.material.tasks)
    checks, figures["tasks"] = check_tasks(items, settings.tasks, settings.level)
    flips, figures["flips"] = flips_of(items)
    return checks, flips, items


def _bias(rivals: Rivals, figures: dict[str, Any]) -> list[Check]:
    pairs, settings = rivals.material.pairs, rivals.settings
    checks = unread_attributes(rivals.material.attributes, pairs)
    if pairs:
        dense, slim = (gaps(m, rivals.tokenizer, pairs) for m in (rivals.dense, rivals.slim))
        found, figures["bias"] = check_bias(pairs, dense, slim, settings.bias, settings.level)
        checks = found + checks
    return checks


def _memorization(
    rivals: Rivals, items: Sequence[Answered],
    prompted: Sequence[tuple[str, str]], figures: dict[str, Any],
) -> list[Check]:  # fmt: skip
    limits, tokenizer = rivals.settings.memorization, rivals.tokenizer
    models = {"dense": rivals.dense, "slim": rivals.slim}
    trained, unseen = rivals.material.passages
    counts: tuple[dict[str, int], dict[str, int]] = ({}, {})
    generated = [*prompted, *((x.prompt, x.said[1]) for x in items if x.generated)]
    for name, model in models.items():
        for passages, count in zip((trained, unseen), counts, strict=True):
            made = continuations(
                model, passages, new_tokens=limits.continued_tokens, end=tokenizer.eos_token_id
            )
            count[name] = returned(passages, made)
            if name == "slim":
                texts = tokenizer.batch_decode(made)
                starts = tokenizer.batch_decode([p.prefix for p in passages])
                generated += list(zip(starts, texts, strict=True))
    checks = [
        check_personal_data(leaked(generated, rivals.material.train_text), len(generated), limits)
    ]
    if limits.prefixes:
        of = (len(trained), len(unseen))
        checks.append(check_extraction(counts[0], counts[1], of, limits, rivals.settings.level))
    figures["memorization"] = {"train": counts[0], "test": counts[1], "passages": len(trained)}
    if planted := rivals.config.canaries:
        exposed = {
            name: exposures(
                model,
                tokenizer,
                planted=planted,
                candidates=limits.candidates,
                seed=rivals.config.seed,
            )
            for name, model in models.items()
        }
        checks.append(check_canaries(exposed["dense"], exposed["slim"], limits))
        figures["memorization"]["exposure"] = exposed
    return checks


def _refusals(rivals: Rivals, items: Sequence[Answered]) -> list[Check]:
    settings, written = rivals.settings, [x for x in items if x.generated]
    if not settings.tasks.items:
        return []
    dense, slim = ([x.said[i] for x in written] for i in (0, 1))
    return [check_refusals(dense, slim, rivals.material.phrases, settings.refusals, settings.level)]
