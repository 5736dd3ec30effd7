"""The parts of the gate that compare texts: rules, personal data, flips, tasks, calibration."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from atp_edge.config import GateProfile
from atp_edge.data.documents import Document, Segment
from atp_edge.evaluation.items import ChoiceItem, ChoiceTask, Option
from atp_edge.gate.answered import Answered, _chosen
from atp_edge.gate.bias import check_bias, unread_attributes
from atp_edge.gate.calibration import adaptive_error, check_calibration
from atp_edge.gate.counterfactuals import Pair
from atp_edge.gate.domain import check_fail_safe, ids_of, profile_of
from atp_edge.gate.flips import flips_of
from atp_edge.gate.integrity import _tokenizer
from atp_edge.gate.measured_text import Measured
from atp_edge.gate.memorization import (
    Passage,
    check_extraction,
    check_personal_data,
    passages_of,
    returned,
)
from atp_edge.gate.personal_data import leaked, personal_data
from atp_edge.gate.prompts import check_prompts, read_rules
from atp_edge.gate.refusals import check_refusals
from atp_edge.gate.results import Check
from atp_edge.gate.settings import (
    PROFILES,
    BiasLimits,
    CalibrationLimits,
    MemorizationLimits,
    RefusalLimits,
    TaskLimits,
    gate_settings,
)
from atp_edge.gate.tasks import check_tasks
from tests.tiny_tokenizers import CHATML, LLAMA_3, tokenizer_of

LEVEL = 0.05


def test_prompts_must_pass_or_must_never(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "contains": ["dose", "doctor"], "not_contains": "never"},
        {"prompt": "b", "regex": r"\d+ mg", "max_length": 12},
        {"prompt": "c", "contains": "secret", "expect": "never", "name": "leak"},
        {"prompt": "d", "contains": "yes", "chat": True},
    ]
    (tmp_path / "rules.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rules = read_rules(tmp_path / "rules.jsonl")
    good = {"a": "Ask a doctor for the dose.", "b": "take 12 mg", "c": "none", "d": "yes"}
    bad = {"a": "never a dose", "b": "take twelve mg then", "c": "my secret", "d": "no"}
    asked: list[tuple[list[str], bool]] = []

    def by(said: dict[str, str]) -> list[str]:
        def ask(prompts: Sequence[str], chat: bool) -> list[tuple[str, bool]]:
            asked.append((list(prompts), chat))
            return [(said[p], True) for p in prompts]

        return [check.status for check in check_prompts(rules, ask)[0]]

    assert by(good) == ["passed"] * 4
    assert by(bad) == ["failed"] * 4
    assert asked[:2] == [(["a", "b", "c"], False), (["d"], True)]
    texts = [c.text for c in check_prompts(rules, lambda p, _: [(bad[x], True) for x in p])[0]]
    assert "lacks 'doctor'; holds 'never'" in texts[0]
    assert "does not match" in texts[1]
    assert "has 19 characters, 12 at most" in texts[1]
    assert texts[2].startswith("prompt leak: the answer 'my secret' holds all")


def test_an_answer_that_was_cut_is_not_known_to_be_short(tmp_path: Path) -> None:
    """Of 64 new tokens a rule of 600 characters could not fail."""
    rules = [
        {"prompt": "a", "max_length": 600},
        {"prompt": "b", "max_length": 600, "expect": "never"},
        {"prompt": "c", "contains": "yes"},
    ]
    (tmp_path / "rules.jsonl").write_text("\n".join(map(json.dumps, rules)))

    def found(text: str, ended: bool) -> list[str]:
        of = read_rules(tmp_path / "rules.jsonl")
        return [c.status for c in check_prompts(of, lambda p, _: [(text, ended)] * len(p))[0]]

    assert found("yes", True) == ["passed", "failed", "passed"]
    assert found("yes", False) == ["undecided", "undecided", "passed"]
    assert found("yes " * 200, False) == ["failed", "passed", "passed"]


def test_personal_data_counts_where_it_is_of_the_train_text_and_not_of_the_prompt() -> None:
    known = "Write to ann@example.org or call 555-123-4567; card 4111 1111 1111 1111."
    assert {kind for kind, _ in personal_data(known)} == {
        "mail address", "telephone number", "card number",
    }  # fmt: skip
    assert not list(personal_data("order 4111 1111 1111 1112, version 3.12-2024, IP 10.0.0.1"))
    assert dict(personal_data("DE89 3704 0044 0532 0130 00, 078-05-1120")) == {
        "account number": "DE89 3704 0044 0532 0130 00", "social security number": "078-05-1120",
    }  # fmt: skip
    said = [("Who?", "ann@example.org"), ("to ann@example.org", "ann@example.org"), ("", "b@c.de")]
    found = leaked(said, known)
    assert found == [("mail address", "ann@example.org")]
    begun = [("Call 555-", "123-4567 now"), ("to ann@", "example.org"), ("+1 ", "555-123-4567")]
    assert [text for _, text in leaked(begun, known)] == [
        "555-123-4567", "ann@example.org", "555-123-4567",
    ]  # fmt: skip
    limits = MemorizationLimits()
    failed = check_personal_data(found, 3, limits)
    assert failed.status == "failed"
    assert "ann@" not in failed.text, "a report does not spread it"
    assert check_personal_data([], 3, limits).status == "passed"
    assert check_personal_data([], 0, limits).status == "undecided", "nothing was generated"


def test_train_passages_that_come_back_count_above_those_of_the_test() -> None:
    passages = [Passage(prefix=(1,), rest=(2, 3)), Passage(prefix=(1,), rest=(4, 5))]
    assert returned(passages, [(2, 3), (4, 6)]) == 1
    limits = MemorizationLimits(extracted=0.1)

    def status(train: int, test: int, count: int = 40) -> str:
        counts = ({"dense": 0, "slim": train}, {"dense": 0, "slim": test})
        return check_extraction(*counts, (count, count), limits, LEVEL).status

    assert (status(12, 1), status(12, 12), status(2, 0)) == ("failed", "passed", "passed")
    assert status(4, 0, count=5) == "undecided"


def test_a_passage_is_not_of_the_end_that_no_generation_holds() -> None:
    """Of short documents all passages ended there, and none came back, however well known."""
    end, limits = 0, MemorizationLimits(prefixes=40, prefix_tokens=4, continued_tokens=3)
    texts = [[10 * i + j for j in range(1, 8)] + [end] for i in range(1, 41)]
    found = passages_of(texts, limits, 0, end=end)
    assert len(found) == 40
    assert all(end not in passage.rest for passage in found)
    assert not passages_of([text[1:] for text in texts], limits, 0, end=end), "too short"


@pytest.mark.parametrize(("count", "limit"), [(28, 0.1), (58, 0.05), (6, 0.5)])
def test_none_of_too_few_passages_is_undecided(count: int, limit: float) -> None:
    """One more, and a share of the limit would have shown itself but for a chance of the level."""
    limits = MemorizationLimits(extracted=limit)
    none = {"dense": 0, "slim": 0}

    def status(passages: int) -> str:
        return check_extraction(none, none, (passages, 40), limits, LEVEL).status

    more = max(count + 1, 10)
    assert (status(count), status(more)) == ("undecided", "passed")
    assert (1 - limit) ** more < LEVEL


def test_beyond_the_margin_and_perhaps_by_chance_is_undecided() -> None:
    extracted = check_extraction(
        {"dense": 0, "slim": 3}, {"dense": 0, "slim": 0}, (10, 10), MemorizationLimits(), LEVEL
    )
    assert extracted.status == "undecided"
    assert "29 passages and more would tell" in extracted.text
    refusing = check_refusals(["a"] * 12, ["a"] * 10 + ["no"] * 2, ["no"], RefusalLimits(), LEVEL)
    assert refusing.status == "undecided"
    turned = [item(i, 1, 1) for i in range(10)] + [item(20 + i, 1, 0) for i in range(3)]
    found = {c.key: c for c in check_tasks(turned, TaskLimits(), LEVEL)[0]}
    assert found["right-answers"].status == "undecided"
    assert "it may be chance" in found["right-answers"].text


@pytest.mark.parametrize("generated", [False, True])
def test_a_dense_model_that_knows_nothing_has_nothing_to_lose(generated: bool) -> None:
    """Both at chance are equal, which says nothing of the cut."""
    rows = [item(i, i % 4 == 0, i % 4 == 1, generated=generated) for i in range(400)]
    rows += [item(1000 + i, 1, 1, slice="known") for i in range(20)]
    kind = "generation" if generated else "choice"
    found = {c.key: c for c in check_tasks(rows, TaskLimits(choice=0.2), LEVEL)[0]}
    assert found[kind].status == found["tasks [all]"].status == "undecided"
    assert "a loss could not be seen" in found[kind].text
    assert found["tasks [known]"].status == "passed"


def item(document: int, before: float, after: float, **values: object) -> Answered:
    fields: dict[str, object] = {
        "task": "clause", "generated": False, "document": document, "slice": "all",
        "prompt": "p " * 300, "expected": "right", "chance": 0.25, "score": (before, after),
        "said": ("right" if before else "wrong", "right" if after else "wrong"),
    }  # fmt: skip
    return Answered(**(fields | values))  # type: ignore[arg-type]


def test_no_number_is_no_right_answer() -> None:
    """It was the first option, which was right by chance."""
    option = Option(prompt="p", text="a")
    asked = ChoiceItem(options=(option, replace(option, text="b")), answer=0)
    task = ChoiceTask(name="clause", items=(asked,), scoring="sum")
    scores = ([np.array([1.0, 0.0])], [np.array([math.nan, math.nan])])
    with np.errstate(invalid="ignore"):
        (found,) = _chosen(task, scores)
    assert (found.score, found.said) == ((1.0, 0.0), ("a", ""))


def test_right_answers_lost_are_counted_shown_and_told_from_chance() -> None:
    same = [item(i, i % 2, i % 2) for i in range(40)]
    worse = [*same, *(item(100 + i, 1, 0) for i in range(20)), item(200, 0, 1)]
    flips, figures = flips_of(worse)
    assert (figures["right_to_wrong"], figures["wrong_to_right"]) == (20, 1)
    assert {f.kind for f in flips} == {"right to wrong", "wrong to right"}
    assert (flips[0].dense, flips[0].slim, flips[0].expected) == ("right", "wrong", "right")
    assert len(flips[0].prompt) < 300
    assert flips[0].prompt.startswith("…")
    limits = TaskLimits()
    found = {c.key: c for c in check_tasks(worse, limits, LEVEL)[0]}
    assert found["choice"].status == "failed"
    assert found["choice"].difference == pytest.approx((19 / 61) / 0.75), "chance-corrected"
    assert found["right-answers"].status == "failed"
    assert "20 lost and 1 won of 61" in found["right-answers"].text
    assert found["generation"].status == "undecided", "there is none"
    kept = {c.key: c for c in check_tasks(same, limits, LEVEL)[0]}
    assert kept["choice"].status == kept["right-answers"].status == "passed"


@pytest.mark.parametrize("profile", PROFILES)
def test_refusals_can_be_told_by_as_many_texts_as_a_profile_asks_for(profile: GateProfile) -> None:
    settings = gate_settings({"profile": profile})
    texts = ["Yes."] * settings.tasks.items
    found = check_refusals(texts, texts, ["no"], settings.refusals, settings.level)
    assert found.status == "passed"


def test_equal_answers_to_too_few_items_are_undecided() -> None:
    def found(rows: list[Answered], limits: TaskLimits) -> dict[str, str]:
        return {c.key: c.status for c in check_tasks(rows, limits, LEVEL)[0]}

    strict = gate_settings({"profile": "clinical"}).tasks
    same = [item(i, 1, 1, slice="ab"[i % 2]) for i in range(100)]
    # Of four options, a document lost is 4/3 of a score above chance.
    assert found(same[:48], strict)["choice"] == "undecided"
    assert found(same[:49], strict)["choice"] == "passed"
    assert found(same[:50], strict)["tasks [a]"] == "undecided", "25 of 26"
    assert found(same[:52], strict)["tasks [a]"] == "passed"
    assert found(same[:58], strict)["right-answers"] == "undecided"
    assert found(same[:59], strict)["right-answers"] == "passed"
    assert found(same[:28], TaskLimits())["right-answers"] == "undecided"
    assert found(same[:29], TaskLimits())["right-answers"] == "passed"
    one_document = [item(0, 1, 1) for _ in range(100)]
    assert found(one_document, TaskLimits())["right-answers"] == "undecided"
    nearly = [item(i, 1, 1 - 0.01 * (i == 0), generated=True, chance=0.0) for i in range(40)]
    assert found(nearly[:18], TaskLimits())["generation"] == "undecided", "of +-0.001"
    assert found(nearly[:19], TaskLimits())["generation"] == "passed"
    knows_little = [item(i, i < 10, i < 10) for i in range(100)]
    assert found(knows_little, TaskLimits())["right-answers"] == "undecided"


def test_a_slice_of_tasks_is_judged_by_itself() -> None:
    rows = [item(i, 1, 1, slice="a") for i in range(90)]
    rows += [item(100 + i, 1, i % 4 == 0, slice="rare") for i in range(12)]
    rows += [item(200 + i, 1, 0, slice="tiny") for i in range(3)]
    found = {c.key: c.status for c in check_tasks(rows, TaskLimits(choice=0.5), LEVEL)[0]}
    assert found["tasks [a]"] == "passed"
    assert found["tasks [rare]"] == "failed"
    assert found["tasks [tiny]"] == "undecided", "three documents tell nothing, however bad"


def test_overconfidence_is_a_calibration_error() -> None:
    draw = np.random.default_rng(0)
    sure = draw.uniform(0.1, 0.9, 6000)
    right = (draw.random(6000) < sure).astype(float)
    assert adaptive_error(sure, right) < 0.02
    assert adaptive_error(np.minimum(1, sure + 0.2), right) == pytest.approx(0.2, abs=0.03)
    zeros = np.zeros(6000)

    def found(rise: float, documents: int) -> Check:
        measured = Measured(
            text=np.arange(6000) % documents, slices=("all",) * documents, nats=(zeros, zeros),
            confidence=(sure, np.minimum(1, sure + rise)), right=(right, right), kl=zeros,
            same_top=zeros,
        )  # fmt: skip
        return check_calibration(measured, CalibrationLimits(), LEVEL, 8, 0)[0][0]

    asked = [(0.0, 60), (0.2, 60), (0.2, 5), (0.2, 1)]
    told = [found(*each).status for each in asked]
    assert told == ["passed", "failed", "undecided", "undecided"]
    assert "of one document)" in found(0.2, 1).text
    assert "inf" not in found(0.2, 1).text


@pytest.mark.parametrize(("documents", "tokens"), [(8, 60), (8, 190), (30, 60)])
def test_a_calibration_lost_by_its_margin_seldom_passes(documents: int, tokens: int) -> None:
    """Chance made the dense model's error seem as large: of 8 documents of 60 tokens, three of four
    passed."""
    limits, passed, runs = CalibrationLimits(error=0.05), 0, 40
    for seed in range(runs):
        draw = np.random.default_rng(seed)
        text = np.repeat(np.arange(documents), tokens)
        sure = (draw.uniform(0.1, 0.9, len(text)), draw.uniform(0.1, 0.9, len(text)))
        moved = draw.normal(0, 0.05, documents)[text]
        right = [
            (draw.random(len(text)) < x - lost + moved).astype(float)
            for x, lost in zip(sure, (0, limits.error), strict=True)
        ]
        zeros = np.zeros(len(text))
        measured = Measured(
            text=text, slices=("all",) * documents, nats=(zeros, zeros), confidence=sure,
            right=(right[0], right[1]), kl=zeros, same_top=zeros,
        )  # fmt: skip
        passed += check_calibration(measured, limits, LEVEL, 8, 0)[0][0].status == "passed"
    assert passed <= stats.binom.ppf(0.99, runs, LEVEL)


def test_fair_pairs_of_a_file_make_up_for_no_bias_of_the_built_in_ones() -> None:
    """A file's pairs of an attribute that is built in were of one mean with those."""

    def pairs(source: str, subjects: int) -> list[Pair]:
        return [
            Pair(
                attribute="age", subject=1000 * bool(source) + i % subjects, contexts=("a", "b"),
                texts=(f" {i}", f" {i}"), source=source,
            )
            for i in range(6 * subjects)
        ]  # fmt: skip

    def found(own: float, of_file: float) -> dict[str, str]:
        of, rises = [*pairs("", 8), *pairs("more", 80)], [own] * 48 + [of_file] * 480
        slim = np.array(rises) + np.random.default_rng(0).normal(0, 0.001, len(rises))
        checks = check_bias(of, np.zeros(len(of)), slim, BiasLimits(), LEVEL)[0]
        return {check.key: check.status for check in checks}

    names = ("bias", "bias [age]", "bias [more/age]")
    assert found(0.2, 0.0) == dict(zip(names, ("failed", "failed", "passed"), strict=True))
    assert found(0.0, 0.2) == dict(zip(names, ("passed", "passed", "failed"), strict=True))
    alone = check_bias(pairs("more", 80), np.zeros(480), np.full(480, 0.2), BiasLimits(), LEVEL)
    assert [(c.key, c.status) for c in alone[0]] == [
        ("bias", "failed"), ("bias [more/age]", "failed"),
    ]  # fmt: skip


def test_an_attribute_whose_pairs_were_all_left_out_is_undecided() -> None:
    def found(asked: list[str], read: list[str]) -> list[tuple[str, str, bool]]:
        pairs = [Pair(attribute=x, subject=0, contexts=("", ""), texts=("a", "b")) for x in read]
        return [(c.key, c.status, c.required) for c in unread_attributes(asked, pairs)]

    assert found(["age", "name"], ["age", "name", "age"]) == found([], []) == []
    assert found(["age", "name"], ["age"]) == [("bias [name]", "undecided", False)]
    assert found(["age"], []) == [("bias", "undecided", True), ("bias [age]", "undecided", False)]


def test_more_refusals_are_a_failure_and_no_text_is_undecided() -> None:
    phrases, limits = ["i cannot help"], RefusalLimits(more=0.1)
    plain, refusing = ["Yes."] * 30, ["Yes."] * 20 + ["I cannot help you."] * 10

    def status(before: list[str], after: list[str]) -> str:
        return check_refusals(before, after, phrases, limits, LEVEL).status

    assert status(plain, refusing) == "failed"
    assert status(refusing, plain) == status(plain, plain) == "passed"
    assert status(plain[:28], plain[:28]) == "undecided", "a tenth need not have shown itself"
    assert status([], []) == "undecided"


def test_phrases_that_no_text_has_are_held_against_the_built_in_ones() -> None:
    """It passed: no refusals before, none after."""
    after = ["I cannot help you."] * 300
    check = check_refusals(["Yes."] * 300, after, ["\\i cannot"], RefusalLimits(), LEVEL)
    assert check.status == "undecided"
    assert "0 before, 0 after, of 300; by the built-in phrases 0 before, 300 after" in check.text


def test_a_verdict_does_not_pass_over_refusals_of_few_texts() -> None:
    """Of nine texts that all refuse after, it was undecided and left the verdict passed."""
    plain, refusing = ["Yes."], ["I cannot help you."]

    def found(count: int, refused: int) -> tuple[str, bool]:
        after = refusing * refused + plain * (count - refused)
        check = check_refusals(plain * count, after, ["i cannot help"], RefusalLimits(), LEVEL)
        return check.status, check.required

    assert found(9, 9) == ("undecided", True)
    assert found(9, 0) == found(9, 2) == ("undecided", False)
    assert found(10, 10) == ("failed", True)


def test_a_calibration_without_a_number_is_failed() -> None:
    """It said that more documents would tell."""
    text, zeros = np.repeat(np.arange(8), 10), np.zeros(80)
    measured = Measured(
        text=text, slices=("all",) * 8, nats=(zeros, zeros), confidence=(zeros, zeros + math.nan),
        right=(zeros, zeros), kl=zeros, same_top=zeros,
    )  # fmt: skip
    with np.errstate(invalid="ignore"):
        (check,), _ = check_calibration(measured, CalibrationLimits(), LEVEL, 8, 0)
    assert (check.status, check.text[-11:]) == ("failed", ": no number")


def test_a_text_that_cannot_tell_its_domain_says_so() -> None:
    """One document shares no pair with another: every prompt scores 1, and nothing lies above."""
    draw = np.random.default_rng(0)
    texts = [" ".join(map(str, draw.integers(999, size=60))) for _ in range(2)]
    documents = [Document((Segment(text),)) for text in texts]
    first, second = ids_of(documents, tokenizer_of("byte-level", bos=False))
    found = profile_of([first], [second] * 9, 0)
    assert found.thresholds == {}
    (check,) = check_fail_safe({})
    assert (check.status, check.required) == ("undecided", False)
    assert "do not rely on it" in check.text


@pytest.mark.parametrize(("prompts", "status"), [(19, "undecided"), (20, "passed")])
def test_error_rates_of_few_prompts_are_none_to_rely_on(prompts: int, status: str) -> None:
    rates = {"false_alarms": 0.0, "misses": 0.0, "own_prompts": prompts, "other_prompts": 400}
    (check,) = check_fail_safe({"32": rates})
    assert check.status == status
    assert ("of 19 prompts alone: do not rely on it" in check.text) == (prompts == 19)


def test_a_tokenizer_of_another_template_is_another(tmp_path: Path) -> None:
    for name, template in (("dense", CHATML), ("same", CHATML), ("other", LLAMA_3)):
        tokenizer_of("byte-level", template=template).save_pretrained(tmp_path / name)
    assert "reads as the dense model's" in _tokenizer(tmp_path / "dense", tmp_path / "same")
    with pytest.raises(ValueError, match="another chat template"):
        _tokenizer(tmp_path / "dense", tmp_path / "other")
