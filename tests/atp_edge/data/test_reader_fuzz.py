"""Whatever a file holds, reading it ends in documents or in one error that names file and place.

ATP_FUZZ=2000 tries more.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from atp_edge.data.blocks import pack
from atp_edge.data.encoding import Encoder
from atp_edge.data.reader import read_corpus
from tests.tiny_tokenizers import CHATML, THINKING, tokenizer_of

TRIES = int(os.environ.get("ATP_FUZZ", "300"))
LONGEST_SECONDS = 20  # of one file; they take milliseconds
NAMES = [".jsonl", ".json", ".txt", ".md", ".csv", ".parquet", ".arrow", ".jsonl.gz", ".json.zst"]
TOKENIZERS = [tokenizer_of("byte-level", template=t) for t in (CHATML, THINKING)]

texts = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["", " ", "<|im_end|>", "\ud83d", "\ufdd0", "\u2028", "a\0b", "user", "text"]),
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
roles = st.sampled_from(["user", "assistant", "system", "tool", "narrator", None, 7])
parts = st.fixed_dictionaries({}, optional={"type": texts, "text": texts})
contents = st.one_of(texts, scalars, st.lists(st.one_of(parts, texts), max_size=3))
calls = st.lists(
    st.one_of(scalars, st.fixed_dictionaries({"function": st.dictionaries(texts, scalars)})),
    max_size=2,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": roles, "content": contents},
        optional={"tool_calls": st.one_of(calls, scalars), "name": scalars},
    ),
    max_size=5,
)
likely = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant"]),
            "content": st.sampled_from(["a", " b\n", "<|im_end|>", "<think>c</think>d"]),
        },
        optional={"tool_calls": st.one_of(calls, scalars), "reasoning_content": scalars},
    ),
    min_size=2,
    max_size=4,
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)
values = st.one_of(anything, messages, texts)
keys = ("text", "prompt", "completion", "messages", "conversations", "tools", "instruction")
rows = st.one_of(
    anything,
    st.fixed_dictionaries({"text": texts}),
    st.fixed_dictionaries({"messages": messages}, optional={"tools": values}),
    st.fixed_dictionaries({"messages": likely}),
    st.fixed_dictionaries({"prompt": likely, "completion": likely}),
    st.fixed_dictionaries({}, optional=dict.fromkeys((*keys, "output", "input", "slice"), values)),
)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file's ending and bytes: rows, or text, then perhaps damaged."""
    name = draw(st.sampled_from(NAMES))
    ascii_alone = draw(st.booleans())
    made = [json.dumps(row, ensure_ascii=ascii_alone) for row in draw(st.lists(rows, max_size=6))]
    text = draw(
        st.sampled_from(
            ["\n".join(made), "\r\n".join(made), f"[{','.join(made)}]", "\n\n".join(made),
             "text,slice\n" + "\n".join(made), "".join(made)]
        )
    )  # fmt: skip
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"]))
    data = bytearray(text.encode(encoding, "surrogatepass" if "utf" in encoding else "replace"))
    packed = {".gz": gzip.compress, ".zst": lambda d: pyarrow.compress(d, "zstd", asbytes=True)}
    data = bytearray(packed.get(Path(name).suffix, bytes)(bytes(data)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return name, bytes(data)


@seed(35)
@settings(
    max_examples=TRIES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(file=files(), skip=st.booleans(), parse=st.booleans(), which=st.integers(0, 1))
def test_any_file_is_read_or_refused_with_its_place(
    file: tuple[str, bytes], skip: bool, parse: bool, which: int
) -> None:
    name, data = file
    tokenizer: Any = TOKENIZERS[which]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"data{name}"
        path.write_bytes(data)
        try:
            corpus = read_corpus(
                str(path),
                tokenizer,
                special_tokens="parse" if parse else "text",
                skip_bad_lines=skip,
            )
        except (ValueError, OSError) as error:
            said = str(error)
            assert str(path) in said, said
            assert re.search(r", (line|row|document) \d|holds no text|damaged|parquet|datasets|not "
                             r"JSON", said), said  # fmt: skip
            said.encode()  # it can be printed
        else:
            assert corpus.documents
            packed = pack(corpus.documents, Encoder(tokenizer), 8, 50)
            assert (packed.blocks.labels[:, 1:] != -100).any(1).all()
    assert time.monotonic() - began < LONGEST_SECONDS
