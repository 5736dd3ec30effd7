"""Bad input of the gate: one clear error each, that names the place and what to do."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from atp_edge.config import Config
from atp_edge.gate.counterfactuals import (
    FIRST_OF_FILES,
    SENTENCES,
    SUBJECTS,
    built_in_pairs,
    read_pairs,
)
from atp_edge.gate.material import asked_of, names_of
from atp_edge.gate.prompts import read_rules
from atp_edge.gate.refusals import BUILT_IN, read_phrases, refuses
from atp_edge.gate.settings import PROFILES, gate_settings, profile_named, read_gate_settings
from atp_edge.pipeline.gate import digest
from atp_edge.settings import configured


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[quality]\nlos = 0.1", "unknown setting 'quality.los'; the nearest known one is"),
        ("levels = 0.1", "unknown setting 'levels'; the nearest known one is 'level'"),
        ("level = 0", "level = 0.0: expected more than 0"),
        ("level = 0.6", "level = 0.6: expected less than 0.5"),
        ("[tasks]\nchoice = 1.5", "tasks.choice = 1.5: expected 0 or more, 1 at most"),
        ("[quality]\nloss = -0.1", "quality.loss = -0.1: expected 0 or more"),
        ("[quality]\nloss = nan", "quality.loss = nan: expected 0 or more"),
        ("[memorization]\ncandidates = 8", "memorization.exposure = 4: expected less than 3.17"),
        ("[memorization]\nexposure = 8", "expected less than 7.01, the most that 128 rivals"),
        ("[memorization]\nexposure = 7\ncandidates = 127", "expected less than 7.00"),
        ("[tasks]\nlost = 0", "tasks.lost = 0.0: expected more than 0, 1 at most"),
        ("[refusals]\nmore = 0", "refusals.more = 0.0: expected more than 0"),
        ("[memorization]\nextracted = 0", "memorization.extracted = 0.0: expected more than 0"),
        ("data = ['']", "data: an empty text names nothing"),
        ("[quality]\nloss = 'low'", "quality.loss = 'low': expected float"),
        ("profile = 'medical'", "profile = 'medical': expected one of default, clinical, legal"),
        ("data = 'one.jsonl'", "data = 'one.jsonl': expected a list of texts"),
        ("level 0.1", "is not TOML"),
        ("[nix]", "unknown setting 'nix'"),
        ("[versions]", "unknown setting 'versions'"),
        ("[versions]\ntorch = '2'", "unknown setting 'versions.torch'"),
    ],
)
def test_thresholds_are_checked(tmp_path: Path, text: str, error: str) -> None:
    file = tmp_path / "gate.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(error)):
        read_gate_settings(file, {})


def test_a_file_of_thresholds_may_be_marked_and_may_be_empty(tmp_path: Path) -> None:
    file = tmp_path / "gate.toml"
    for text in ("", "[quality]\n"):
        file.write_text(text)
        assert read_gate_settings(file, {}) == gate_settings({}), "the profile as it is"
    file.write_text("profile = 'clinical'", encoding="utf-8-sig")
    assert read_gate_settings(file, {}).profile == "clinical"


def test_a_profile_lies_under_what_is_given_and_paths_are_beside_the_file(tmp_path: Path) -> None:
    file = tmp_path / "gate.toml"
    file.write_text("profile = 'clinical'\ndata = ['more.jsonl']\n[quality]\nloss = 0.2\n")
    found = read_gate_settings(file, {"tasks.choice": 0.5})
    assert (found.quality.loss, found.tasks.choice) == (0.2, 0.5)
    assert found.quality.kl == PROFILES["clinical"]["quality.kl"]
    assert found.undecided == "fail"
    assert found.data == (str(tmp_path / "more.jsonl"),)
    for profile, values in PROFILES.items():
        strict, default = gate_settings({"profile": profile}), gate_settings({})
        assert all(
            values[key] <= getattr(getattr(default, section), leaf)
            for key in values
            if "." in key
            and key not in ("memorization.prefixes", "tasks.items")  # more of them tell more
            for section, _, leaf in [key.partition(".")]
        )
        assert strict.profile == profile


def test_files_that_are_named_by_flags_are_asked_beside_those_of_the_file(tmp_path: Path) -> None:
    """They took their place: rules of the file were not asked, and nothing said so."""
    file = tmp_path / "gate.toml"
    file.write_text("data = ['a']\n[bias]\nfiles = ['b']\n[prompts]\nfiles = ['c']\n")
    flags = {"data": ["d"], "bias.files": ["e"], "prompts.files": ["f"], "slice_by": "ward"}
    found = read_gate_settings(file, flags)
    of_file = (str(tmp_path / name) for name in "abc")
    listed = zip((found.data, found.bias.files, found.prompts.files), of_file, "def", strict=True)
    assert all(names == (own, flag) for names, own, flag in listed)
    assert found.slice_by == "ward"
    assert read_gate_settings(None, flags).data == ("d",)
    assert profile_named(file) is None
    file.write_text("profile = 'legal'")
    assert profile_named(file) == "legal"


Read = Any
_HALF = "given.jsonl, line 1: holds half a character, the lone surrogate"


def test_a_phrase_may_have_brackets_and_quotes(tmp_path: Path) -> None:
    file = tmp_path / "phrases.txt"
    bare = ["[redacted]", "{redacted}", '"no" is what i say to "this"', "i am sorry,", "404"]
    file.write_text("\n".join(bare))
    assert read_phrases(file) == bare


@pytest.mark.parametrize(
    "text",
    ['[{"phrase": "I cannot"}]', '[["I cannot"]]', "[]", "[1, 2]", "null", '[\n"I cannot"]',
     "'I cannot'", "'I can't'", "['I cannot']", "“I cannot”", "«I cannot»", "`I cannot`",
     '"I cannot" ,', '"I cannot";', '"I cannot"  # no', '"I cannot",en', "- I cannot",
     "* I cannot", 'phrases = ["I cannot"]', "I cannot,\nI will not,", "I cannot,\nI will not"],
)  # fmt: skip
def test_what_no_text_would_hold_is_no_phrase(tmp_path: Path, text: str) -> None:
    file = tmp_path / "phrases.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match="expected a phrase a line, bare"):
        read_phrases(file)


@pytest.mark.parametrize(
    ("read", "text", "error"),
    [
        (read_rules, "", "is empty: expected a JSON object a line"),
        (read_rules, "[1]", "line 1: expected an object, found int"),
        (read_rules, "{", "line 1: not JSON"),
        (read_rules, '{"prompt": "a", "prompt": "b"}', "the key 'prompt' stands twice"),
        (read_rules, '{"prompt": "a", "contain": "b"}', "unknown field 'contain'; known are chat"),
        (read_rules, '{"prompt": "a"}', "no rule; give one of contains"),
        (read_rules, '{"prompt": 1, "contains": "b"}', "prompt: expected a text"),
        (read_rules, '{"prompt": "a", "regex": "("}', "regex '(': "),
        (read_rules, '{"prompt": "a", "max_length": -1}', "max_length = -1: expected a number"),
        (read_rules, '{"prompt": "a", "contains": [1]}', "contains = [1]: expected a text"),
        (read_rules, '{"prompt": "a", "contains": 5}', "contains = 5: expected a text or a list"),
        (read_rules, '{"prompt": "a", "regex": null}', "regex = None: expected a text or a list"),
        (read_rules, '{"prompt": "a", "contains": "b", "expect": "no"}', "expected pass or never"),
        (read_rules, '{"prompt": "a", "contains": "b", "chat": 1}', "expected true or false"),
        (read_rules, '{"prompt": "a", "max_length": 9, "name": 5}', "name = 5: expected a text"),
        (read_rules, '{"prompt": "a", "max_length": 9, "name": ""}', "name = '': expected a text"),
        (read_rules, r'{"prompt": "a", "max_length": 9, "name": "\ud800x"}', _HALF),
        (read_rules, r'{"prompt": "a", "contains": ["b", "\udfff"]}', _HALF),
        (lambda p: read_pairs(p, {}), r'{"a": "x", "b": "y", "attribute": "\ud800x"}', _HALF),
        (lambda p: read_pairs(p, {}), '{"a": "x", "b": "y"}', "expected the texts a, b and"),
        (lambda p: read_pairs(p, {}), '{"a": "x", "b": "x", "attribute": "z"}', "the same text"),
        (lambda p: read_pairs(p, {}), '{"a": "x y", "b": "x  y ", "attribute": "z"}', "same text"),
        (read_phrases, "# none\n", "holds no phrase"),
        (read_phrases, 'I cannot\n{"phrase": "I will not"}', "in quotes: expected a phrase a line"),
        (read_phrases, '["I cannot", "I will not"]', "in quotes: expected a phrase a line"),
        (read_phrases, 'I cannot\n  "I will not",\n', "in quotes: expected a phrase a line"),
    ],
)
def test_files_are_checked_line_by_line(tmp_path: Path, read: Read, text: str, error: str) -> None:
    file = tmp_path / "given.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(error)) as raised:
        read(file)
    assert str(file) in str(raised.value)
    file.write_bytes(b"\xe9")
    with pytest.raises(ValueError, match=r"is not? UTF-8"):
        read(file)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "nowhere.jsonl"))):
        read(tmp_path / "nowhere.jsonl")


def test_a_rule_is_known_by_its_name(tmp_path: Path) -> None:
    """Else two checks have one name, in gate.json and in what CI reads."""
    rule = '{"prompt": "a", "contains": "b"%s}'
    for name, of_it in (("one", ', "name": "x"'), ("two", ', "name": "x"'), ("three", "")):
        (tmp_path / f"{name}.jsonl").write_text(rule % of_it)
    one, two, three = (str(tmp_path / f"{name}.jsonl") for name in ("one", "two", "three"))
    for files, count in (([one, three], 2), ([one, f"{tmp_path}/./one.jsonl"], 1)):
        asked = gate_settings({"prompts.files": files})
        assert len(asked_of(Config(), asked)[0]) == count
    with pytest.raises(ValueError, match="two rules are named 'x': give each a name of its own"):
        asked_of(Config(), gate_settings({"prompts.files": [one, two]}))


@pytest.mark.parametrize("domain", ["legal", "health", "own.jsonl"])
def test_every_domain_has_500_pairs_or_more_that_differ_in_the_subject_alone(domain: str) -> None:
    pairs = built_in_pairs(domain, 10_000, 0)
    assert len(pairs) >= 500
    assert {p.attribute for p in pairs} == set(SUBJECTS)
    assert len({(p.contexts, p.texts) for p in pairs}) == len(pairs)
    assert all(p.texts[0] == p.texts[1] and p.contexts[0] != p.contexts[1] for p in pairs)
    told = " ".join(x for sentences in SENTENCES.values() for x in sentences)
    assert not re.search(r"\b(he|she|his|her|him|hers)\b", told), "else a sentence gives it away"
    few = Counter(pair.attribute for pair in built_in_pairs(domain, 42, 0))
    assert sorted(few.values()) == [10, 10, 11, 11], "as many of every attribute"


def test_a_pair_of_a_file_is_scored_on_what_both_share_after_the_difference(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        '{"a": "He is old and very kind", "b": "She is old and very kind", "attribute": "x"}\n'
        '{"a": "Nobody is late", "b": "Nobody is kind", "attribute": "x"}\n'
    )
    first, second = read_pairs(file, {})
    assert (first.contexts, first.texts) == (("He", "She"), (" is old and very kind",) * 2)
    assert (second.contexts, second.texts) == (("", ""), ("Nobody is late", "Nobody is kind"))
    assert (first.subject, second.subject) == (FIRST_OF_FILES, FIRST_OF_FILES + 1)
    file.write_text(file.read_text() * 4)
    assert len({pair.subject for pair in read_pairs(file, {})}) == 2, "said again is not said more"
    file.write_text(
        '{"a": "He is old and kind", "b": "She is old and kind", "attribute": "x"}\n'
        '{"a": "She is old  and kind", "b": "He is old and kind ", "attribute": " x "}\n'
    )
    found = read_pairs(file, {})
    told = {(pair.subject, pair.attribute) for pair in found}
    assert told == {(FIRST_OF_FILES, "x")}, "as one comparison"


def test_a_comparison_of_two_files_is_one_cluster(tmp_path: Path) -> None:
    """Where no pair is built in, all are judged together, and the same ones twice looked surer."""
    row = '{"a": "He is old and kind", "b": "She is old and kind", "attribute": "x"}'
    files = [tmp_path / "old.jsonl", tmp_path / "new.jsonl"]
    for file in files:
        file.write_text(row)
    values = {"bias.pairs": 0, "bias.files": [*map(str, files), f"{tmp_path}/./old.jsonl"]}
    pairs = asked_of(Config(), gate_settings(values))[2]
    assert [pair.kind for pair in pairs] == ["old/x", "new/x"]
    assert len({pair.subject for pair in pairs}) == 1


def test_refusals_are_told_by_phrases() -> None:
    phrases = read_phrases(BUILT_IN)
    assert refuses("I’m sorry, but\nI cannot do that.", phrases)
    assert not refuses("The court cannot help it.", phrases)


@pytest.mark.parametrize(
    "line",
    [
        "I can’t help", "\ufeffI can't help", "I  can't\thelp", "I\u00a0can't help",
        "  I CAN'T help  ", "I can\u2018t help", "I can't\u200b help", "I can't\u2028help",
    ],
)  # fmt: skip
@pytest.mark.parametrize("said", ["Sorry, I can't help.", "I can’t\u00a0help with that"])
def test_a_phrase_matches_however_it_is_typed(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "phrases.txt"
    file.write_text(f"{line}\n  # a comment: sorry\n\u200b\n", encoding="utf-8")
    phrases = read_phrases(file)
    assert phrases == ["i can't help"]
    assert refuses(said, phrases)
    assert not refuses("Yes: a comment.", phrases)
    file.write_text("Ça ne va pas", encoding="utf-16")
    assert refuses("C\u0327a ne va pas!", read_phrases(file))


def test_files_of_one_name_are_slices_of_their_own() -> None:
    assert names_of(["d/x.jsonl", "y.csv"]) == {"d/x.jsonl": "x", "y.csv": "y"}
    assert list(names_of(["d/x.jsonl", "e/x.jsonl"]).values()) == ["d/x.jsonl", "e/x.jsonl"]
    assert list(names_of(["x.csv", "x.jsonl"]).values()) == ["x.csv", "x.jsonl"]
    assert names_of(["x.jsonl", "x.jsonl"]) == {"x.jsonl": "x"}


def test_a_file_that_is_named_in_two_ways_is_one(tmp_path: Path) -> None:
    """By `gate.toml` and by a flag, all its pairs counted twice, as twice as many clusters."""
    whole = str(Path("x.jsonl").resolve())
    assert names_of(["x.jsonl", "./x.jsonl", whole]) == {"x.jsonl": "x"}
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "y.jsonl")
    assert len(names_of([str(tmp_path / name) for name in ("y.jsonl", "link.jsonl")])) == 1
    assert list(names_of(["/x.jsonl", "x.jsonl"]).values()) == ["//x.jsonl", "x.jsonl"]


def test_a_line_ends_at_its_end_and_a_byte_order_mark_is_none_of_it(tmp_path: Path) -> None:
    file = tmp_path / "rules.jsonl"
    file.write_text('{"prompt": "a\u2028b", "contains": "c"}\r\n', encoding="utf-8-sig")
    (rule,) = read_rules(file)
    assert rule.prompt == "a\u2028b"


@pytest.mark.parametrize("key", ["data", "refusals.phrases", "prompts.files"])
def test_the_gate_is_done_again_when_a_file_of_its_thresholds_changes(
    tmp_path: Path, key: str
) -> None:
    file, toml = tmp_path / "named.jsonl", tmp_path / "gate.toml"
    section, _, name = key.rpartition(".")
    value = '"named.jsonl"' if key == "refusals.phrases" else '["named.jsonl"]'
    toml.write_text(f"[{section}]\n{name} = {value}\n" if section else f"{name} = {value}\n")
    config = configured({"gate.config": str(toml)})
    found = []
    for text in ("one", "another"):
        file.write_text(text)
        found.append(digest(config))
    assert found[0] != found[1]
    file.write_text("one")
    assert digest(config) == found[0]


def test_rules_are_json(tmp_path: Path) -> None:
    """A table's empty cell would be a rule that any answer meets."""
    file = tmp_path / "given.csv"
    file.write_text("prompt,contains,regex\na,b,\n")
    with pytest.raises(ValueError, match=r"given\.csv: expected \.jsonl"):
        read_rules(file)
