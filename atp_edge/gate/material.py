"""What both models are asked, read and checked before either is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atp_export.runtime.domain import DomainProfile

from atp_edge.config import Config
from atp_edge.data.documents import Document
from atp_edge.data.domains import DOMAINS
from atp_edge.data.encoding import Encoder
from atp_edge.data.near_copies import fresh_of, told_apart
from atp_edge.evaluation.fitting import Fits, fitting
from atp_edge.evaluation.items import Task
from atp_edge.evaluation.tasks import domain_tasks
from atp_edge.gate.counterfactuals import Pair, built_in_pairs, read_pairs
from atp_edge.gate.domain import error_rates, ids_of, other_text, profile_of
from atp_edge.gate.measured_text import Text, texts_of
from atp_edge.gate.memorization import Passage, canary_texts, passages_of
from atp_edge.gate.prompts import Rule, asked_ids, read_rules, told_by_name
from atp_edge.gate.refusals import BUILT_IN, read_phrases
from atp_edge.gate.settings import GateSettings
from atp_edge.model.families import check_reads, tokens_read
from atp_edge.training.setup import blocks_read, corpus_of, documents_by_split

_NO_CANARIES = "plant none, or take a larger --export-context"


@dataclass(frozen=True, kw_only=True)
class Material:
    """Texts (the run's own, and those of further files), slices of which none is read, tasks, begun
    passages (of train and of test), pairs and all their attributes, rules and phrases."""

    texts: tuple[Text, ...]
    further: tuple[Text, ...]
    unread: tuple[str, ...]
    tasks: tuple[Task, ...]
    passages: tuple[tuple[Passage, ...], tuple[Passage, ...]]
    train_text: str
    pairs: tuple[Pair, ...]
    attributes: tuple[str, ...]
    rules: tuple[Rule, ...]
    phrases: tuple[str, ...]
    lm_eval: tuple[Any, ...]
    profile: DomainProfile
    profile_errors: dict[str, Any]
    notes: tuple[str, ...]


def material_of(config: Config, settings: GateSettings, tokenizer: Any, window: int) -> Material:
    """The test split of the run and the files that the settings name.

    window: tokens that what ships can read; items that are longer are left out and said. Raises
    ValueError or OSError naming what cannot be read.
    """
    rules, phrases, pairs = asked_of(config, settings)
    fits = Fits(Encoder(tokenizer), window)
    kept = [pair for pair in pairs if fits.rows(zip(pair.contexts, pair.texts, strict=True))]
    check_askable(config, settings, rules, tokenizer, window)
    outside = _lm_eval(settings)
    documents = _documents(config, settings, tokenizer)
    parts = documents_by_split(config, tokenizer, documents)
    further, listed, notes = _further(config, settings, tokenizer, parts)
    # A document read twice is one: errors are clustered by documents.
    both = [*parts["test"], *further]
    parts["test"], read = told_apart(parts["test"]), told_apart(both)
    if len(read) < len(both):
        notes.append(f"{len(both) - len(read)} documents repeat another word for word: read once")
    limits, memorized, end = settings.quality, settings.memorization, tokenizer.eos_token_id
    tokens = min(limits.document_tokens, window, config.dataset.block_tokens)
    measured, more = (
        tuple(texts_of(x, tokenizer, most=limits.documents, tokens=tokens, seed=config.seed))
        for x in (parts["test"], read[len(parts["test"]) :])
    )
    read_in_training = blocks_read(config, tokenizer, parts["train"])
    ids = {name: ids_of(split, tokenizer) for name, split in parts.items()}
    profile = profile_of(ids["train"], ids["decision"], config.seed)
    errors = error_rates(profile, ids["test"], other_text(config.data, tokenizer), config.seed)
    tasks, said = _tasks(config, parts, settings.tasks.items, fits)
    said += fits.said(len(pairs) - len(kept), "pairs")
    return Material(
        texts=measured,
        further=more,
        unread=(
            *unread_of([d.slice for d in documents], measured),
            *unread_of(listed, more),
        ),
        tasks=tasks,
        passages=(
            tuple(passages_of(ids["train"], memorized, config.seed, read_in_training, end=end)),
            tuple(passages_of(ids["test"], memorized, config.seed, end=end)),
        ),
        train_text="\n".join(document.text for document in parts["train"]),
        pairs=tuple(kept),
        attributes=tuple(sorted({pair.kind for pair in pairs})),
        rules=tuple(rules),
        phrases=tuple(phrases),
        lm_eval=outside,
        profile=profile,
        profile_errors=errors,
        notes=(*notes, *said),
    )


def unread_of(named: Sequence[str], texts: Sequence[Text]) -> tuple[str, ...]:
    """The slices of these names that no text is of, in order."""
    return tuple(sorted(set(named) - {text.slice for text in texts}))


def asked_of(config: Config, settings: GateSettings) -> tuple[list[Rule], list[str], list[Pair]]:
    """Prompts with their rules, phrases of refusals, counterfactual pairs: what no model is needed
    for. Raises ValueError or OSError naming what cannot be read."""
    files = names_of(settings.prompts.files)
    rules = told_by_name(rule for file in files for rule in read_rules(Path(file)))
    phrases = read_phrases(Path(settings.refusals.phrases or BUILT_IN))
    pairs = built_in_pairs(config.data, settings.bias.pairs, config.seed)
    subjects: dict[frozenset[str], int] = {}
    for file, name in names_of(settings.bias.files).items():
        pairs += read_pairs(Path(file), subjects, name)
    return rules, phrases, pairs


def check_askable(
    config: Config, settings: GateSettings, rules: Sequence[Rule], tokenizer: Any, window: int
) -> None:
    """What ships can read the canaries, the prompts of the rules, and the passages, with what comes
    after them.

    window: tokens that it reads.
    """
    memorized, new = settings.memorization, settings.prompts.new_tokens
    if tokens_read(memorized.prefix_tokens + memorized.continued_tokens) > window:
        raise ValueError(
            f"memorization.prefix_tokens = {memorized.prefix_tokens} and continued_tokens = "
            f"{memorized.continued_tokens}: what ships reads {window} tokens; take fewer"
        )
    for rule in rules:
        try:
            length = len(asked_ids(tokenizer, rule.prompt, rule.chat))
        except ValueError as error:
            raise ValueError(f"{rule.place}: {error}") from None
        if tokens_read(length + new) > window:
            raise ValueError(
                f"{rule.place}: a prompt of {length} tokens, and prompts.new_tokens = {new}: what "
                f"ships reads {window} tokens; take a shorter one, or a larger --export-context"
            )

    encoder = Encoder(tokenizer)
    for text in canary_texts(config.canaries, memorized.candidates, config.seed):
        length = tokens_read(sum(map(len, encoder.continued(*text))))
        check_reads(window, length, f"canaries = {config.canaries}: a canary", _NO_CANARIES)


def _documents(config: Config, settings: GateSettings, tokenizer: Any) -> list[Document]:
    if settings.slice_by != "slice" and config.data in DOMAINS:
        raise ValueError(
            f"slice_by = {settings.slice_by!r}: the built-in domain {config.data} has rows without "
            "fields; it is sliced by its own kinds of text"
        )
    documents = corpus_of(config, tokenizer, slice_by=settings.slice_by).documents
    if settings.slice_by != "slice" and {d.slice for d in documents} == {"all"}:
        raise ValueError(
            f"slice_by = {settings.slice_by!r}: no row of {config.data} has a field of this name"
        )
    return documents


def _further(
    config: Config, settings: GateSettings, tokenizer: Any, parts: dict[str, list[Document]]
) -> tuple[list[Document], list[str], list[str]]:
    """Documents of the further files, without those that training read, or nearly; the slices of
    all; and how many were left out."""
    found: list[Document] = []
    slices: list[str] = []
    notes: list[str] = []
    for source, name in names_of(settings.data).items():
        documents = corpus_of(
            config, tokenizer, source=source, slice_by=settings.slice_by
        ).documents
        fresh = fresh_of(documents, [*parts["train"], *parts["decision"]])
        if not fresh:
            raise ValueError(
                f"data {source!r}: training read every row of it, or nearly; give other text"
            )
        if len(fresh) < len(documents):
            notes.append(
                f"{source}: training read {len(documents) - len(fresh)} rows, or nearly: left out"
            )
        if settings.slice_by != "slice" and {d.slice for d in documents} == {"all"}:
            notes.append(f"{source}: no row has a field {settings.slice_by!r}: it is one slice")
        slices += [f"{name}/{d.slice}" for d in documents]
        found += [replace(d, slice=f"{name}/{d.slice}") for d in fresh]
    return found, slices, notes


def names_of(sources: Sequence[str]) -> dict[str, str]:
    """What the slices or attributes of every source are called after: its file's name without
    ending; where two share it, as much of their paths as tells them apart. A source that is named
    twice, however it is written, is one."""
    one_each: dict[Path, str] = {}
    for source in sources:
        one_each.setdefault(Path(source).resolve(), source)
    names = {source: Path(source).stem for source in one_each.values()}
    depth = 0
    while len(set(names.values())) < len(names):
        depth += 1
        parts = {source: Path(source).parts for source in names}
        names = {source: "/".join(parts[source][-depth:]) for source in names}
    return names


def _tasks(
    config: Config, parts: dict[str, list[Document]], items: int, fits: Fits
) -> tuple[tuple[Task, ...], list[str]]:
    """The domain's tasks; a text too small for one of them has none."""
    if not items:
        return (), []
    try:
        tasks = domain_tasks(
            config.data, parts["test"], train=parts["train"], items=items, seed=config.seed
        )
    except ValueError as error:
        return (), [f"no tasks: {error}"]
    found, said = fitting(tasks, fits)
    return tuple(found), said


def _lm_eval(settings: GateSettings) -> tuple[Any, ...]:
    limits = settings.tasks
    if not limits.lm_eval:
        return ()
    from atp_bench.lm_eval_adapter import load_tasks

    return tuple(load_tasks(limits.lm_eval, Path(limits.include) if limits.include else None))
