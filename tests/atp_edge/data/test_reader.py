"""Data as people have it, from file to documents; bad rows are named, or left out and counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from transformers import AutoTokenizer

from atp_edge.data.reader import _slice_of, read_corpus
from tests.tiny_tokenizers import CHATML, tokenizer_of

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yo"}
ROWS = [{"text": "one é\u2028"}, {"prompt": "Q ", "completion": "A"}, {"messages": [USER, ANSWER]}]
TEXTS = [
    "one é\u2028",
    "Q A",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_of("byte-level", template=CHATML)


def saved(folder: Path, name: str, rows: list[Any]) -> str:
    path = folder / name
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return str(path)


def test_jsonl_in_its_three_forms(tmp_path: Path, real_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    rows = [
        {"text": "All rights reserved."},
        {"prompt": "Q: may I? ", "completion": "A: you may."},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    plain, pair, chat = read_corpus(str(path), tokenizer).documents
    assert [s.learn for s in plain.segments] == [True]
    assert [s.learn for s in pair.segments] == [False, True]
    learned = "".join(s.text for s in chat.segments if s.learn)
    assert "Yo" in learned
    assert "Hi" not in learned
    expected = tokenizer.apply_chat_template(rows[2]["messages"], tokenize=False)
    assert chat.text == expected


@pytest.mark.parametrize("compressed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("array", [False, True])
def test_json_in_every_wrapping(
    tmp_path: Path, tokenizer: Any, array: bool, encoding: str, compressed: str
) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    data = (json.dumps(ROWS, indent=1) if array else "\r\n".join(lines)).encode(encoding)
    pack = {"": bytes, ".gz": gzip.compress, ".zst": lambda d: pyarrow.compress(d, "zstd", True)}
    path = tmp_path / f"a.json{'' if array else 'l'}{compressed}"
    path.write_bytes(pack[compressed](data))
    assert [d.text for d in read_corpus(str(path), tokenizer).documents] == TEXTS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"line 2: not JSON"),
        ('{"text": "a", "text": "b"}', r"line 2: not JSON \(the key 'text' stands twice"),
        ('{"txt": "x"}', r"line 2: found the keys \['txt'\]; expected text"),
        ("[1]", r"line 2: found the keys \[\]"),
        ('{"text": null}', r"line 2: text: null"),
        ('{"text": 7}', r"line 2: text is a number"),
        ('{"text": ""}', r"line 2: text is empty"),
        ('{"text": "a \\ud83d b"}', r"half a character, the lone surrogate '\\ud83d'"),
        ('{"text": "a", "slice": "\\udc00"}', r"line 2: holds half a character"),
        ('{"prompt": "\\ud83d", "completion": "b"}', r"line 2: holds half a character"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}, '
         '{"role": "assistant", "content": "a"}]}', r"line 2: holds half a character"),
        ('{"text": "a \\ufdd0 b"}', r"line 2: holds U\+FDD0, which stands for no character"),
        ('{"messages": []}', r"line 2: no message of the assistant"),
        ('{"messages": [{"role": "user", "content": ' + "[" * 900 + "]" * 900 + "}]}", r"line 2: "),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Any, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_corpus(str(path), tokenizer)
    corpus = read_corpus(str(path), tokenizer, skip_bad_lines=True)
    assert [d.text for d in corpus.documents] == ["fine"]
    assert corpus.rows_skipped == 1


def test_bytes_that_are_no_text_are_a_bad_line(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"line 2: byte 0xe9 at byte offset 27 is no UTF-8"):
        read_corpus(str(path), tokenizer)
    corpus = read_corpus(str(path), tokenizer, skip_bad_lines=True)
    assert [d.text for d in corpus.documents] == ["a", "b"]


def test_many_bad_lines_are_one_error(tmp_path: Path, tokenizer: Any) -> None:
    source = saved(tmp_path, "a.jsonl", [{"text": "a"}, *[{"text": None}] * 9])
    message = r"line 2: text: null.*line 3: .*line 4: .*; and 6 more bad rows \(--dataset-skip-bad"
    with pytest.raises(ValueError, match=message):
        read_corpus(source, tokenizer)
    bad = saved(tmp_path, "b.jsonl", [{"text": None}] * 2)
    with pytest.raises(ValueError, match=r"holds no text: all 2 rows are bad; .*b.jsonl, line 1:"):
        read_corpus(bad, tokenizer, skip_bad_lines=True)


def test_templates_that_fail_are_named_with_their_line(tmp_path: Path) -> None:
    source = saved(tmp_path, "a.jsonl", [{"messages": [USER, ANSWER]}])
    with pytest.raises(ValueError, match=r"line 1: the chat template fails \(UndefinedError"):
        read_corpus(source, tokenizer_of("byte-level", template="{{ messages[5].content }}"))
    with pytest.raises(ValueError, match=r"line 1: messages need a chat template"):
        read_corpus(source, tokenizer_of("byte-level"))


def test_a_tokenizer_without_an_end_is_refused_before_anything_is_read() -> None:
    tokenizer = tokenizer_of("byte-level")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no eos_token"):
        read_corpus("no such file", tokenizer)


def test_plain_text_csv_and_parquet(tmp_path: Path, tokenizer: Any) -> None:
    import datasets

    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    assert len(read_corpus(str(tmp_path / "a.txt"), tokenizer).documents) == 3
    table = datasets.Dataset.from_list([{"text": "x"}, {"text": "y"}])
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for name in ("a.csv", "a.parquet", "saved"):
        documents = read_corpus(str(tmp_path / name), tokenizer).documents
        assert [document.text for document in documents] == ["x", "y"]


def test_an_empty_cell_and_a_null_are_named(tmp_path: Path, tokenizer: Any) -> None:
    import datasets

    (tmp_path / "a.csv").write_text("text,slice\na,b\n,b\n")
    with pytest.raises(ValueError, match=r"a.csv, line 3: text is empty"):
        read_corpus(str(tmp_path / "a.csv"), tokenizer)
    datasets.Dataset.from_list([{"text": "x"}, {"text": None}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 1: text: null"):
        read_corpus(str(tmp_path / "a.parquet"), tokenizer)


@pytest.mark.parametrize("name", ["nothing.jsonl", "a.docx"])
def test_data_that_is_none_is_named(tmp_path: Path, tokenizer: Any, name: str) -> None:
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match=r"expected .*jsonl"):
        read_corpus(str(tmp_path / name), tokenizer)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv", "a.jsonl.gz"])
def test_an_empty_file_is_named(tmp_path: Path, tokenizer: Any, name: str) -> None:
    data = gzip.compress(b"\n \n") if name.endswith(".gz") else b"\n \n"
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}' holds no text"):
        read_corpus(str(tmp_path / name), tokenizer)


def test_special_token_text_is_counted_and_read_as_asked(tmp_path: Path, tokenizer: Any) -> None:
    typed = {"role": "user", "content": "what is <|im_end|>?"}
    rows = [{"text": "end with <|im_end|> here"}, {"text": "b"}, {"messages": [typed, ANSWER]}]
    source = saved(tmp_path, "a.jsonl", rows)
    corpus = read_corpus(source, tokenizer)
    assert corpus.rows_with_special_tokens == 2
    assert not corpus.documents[0].segments[0].parse
    assert [s.text for s in corpus.documents[2].segments if not s.parse] == ["<|im_end|>"]
    parsed = read_corpus(source, tokenizer, special_tokens="parse")
    assert parsed.rows_with_special_tokens == 2
    assert all(s.parse for d in parsed.documents for s in d.segments)


def test_what_the_user_wrote_is_kept_apart_from_its_rendering(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief. " * 50}
    source = saved(tmp_path, "a.jsonl", [{"messages": [system, USER, ANSWER]}])
    keys = {
        read_corpus(source, tokenizer_of("byte-level", template=f"{n}{CHATML}")).documents[0].key
        for n in range(2)
    }
    assert len(keys) == 1
    (document,) = read_corpus(source, tokenizer_of("byte-level", template=CHATML)).documents
    assert document.compared == "Hi\nYo"  # rows that share a system prompt are no near copies


@pytest.mark.real
@pytest.mark.parametrize("domain", ["legal", "health"])
def test_built_in_domains_are_read_from_their_packages(domain: str, tokenizer: Any) -> None:
    documents = read_corpus(domain, tokenizer).documents
    assert len(documents) > 1000
    assert len({d.slice for d in documents}) > 5
    assert min(len(d.text) for d in documents) >= 390


def test_only_rows_without_the_field_are_of_no_slice() -> None:
    """0, false and an empty text are values as any other."""
    rows = [{"ward": ward} for ward in (0, 0.0, False, "", None, "b")]
    found = [_slice_of(row.get("ward")) for row in [*rows, {}]]
    assert found == ["0", "0.0", "False", '""', "all", "b", "all"]


def test_a_slice_that_is_called_all_is_apart_from_rows_without_one() -> None:
    assert _slice_of("all") == '"all"'
    values = [None, "all", '"all"', "", '""', '"']
    assert len({_slice_of(value) for value in values}) == len(values)
