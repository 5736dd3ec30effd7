"""Generation at its limits: context, padding, end tokens, links, damaged weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from atp_export.export import export_onnx
from atp_export.runtime import Generation, Generator, Sampling, Session, generate_tokens
from atp_export.runtime.generator import stream_tokens
from atp_export.runtime.sampling import cut
from atp_export.runtime.session import read_adapter

from atp_edge.model.checkpoint import save_narrow
from tests.atp_export.test_manifest import as_in_the_hubs_cache
from tests.sources import edit, save_source
from tests.tiny import tiny_model

FLAVOURS = ["ort", "standard", "portable"]
CONTEXT = 64


@pytest.fixture(scope="module", params=FLAVOURS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in every flavour, made for few tokens."""
    root = tmp_path_factory.mktemp(request.param)
    save_source(root / "slim")
    export_onnx(root / "slim", root / "onnx", flavour=request.param, context=CONTEXT)
    return root / "onnx"


GREEDY = Sampling()
Rows = list[list[int]]
Generate = Callable[..., Rows]


def many(session: Session, rows: Rows, new: int, sampling: Sampling = GREEDY) -> Rows:
    return generate_tokens(session, rows, max_new_tokens=new, sampling=sampling)


def one(session: Session, rows: Rows, new: int, sampling: Sampling = GREEDY) -> Rows:
    return [list(stream_tokens(session, rows[0], new, sampling))]


def test_logits_from_a_place_on_are_those_of_the_whole(folder: Path) -> None:
    """Rows padded on the right, as scoring has them."""
    session = Session(folder)
    tokens = np.arange(5, 25).reshape(2, 10)
    mask = np.array([[1] * 10, [1] * 7 + [0] * 3])
    whole, rest = (Generation(session, 2, 10).step(tokens, mask, first=first) for first in (0, 6))
    assert rest.shape == (2, 4, session.vocabulary)
    np.testing.assert_allclose(rest[0], whole[0, 6:], atol=1e-5)
    np.testing.assert_allclose(rest[1, :1], whole[1, 6:7], atol=1e-5)


@pytest.mark.parametrize("generate", [many, one])
@pytest.mark.parametrize("prompt", [1, CONTEXT - 7, CONTEXT])
def test_the_whole_context_may_be_used(folder: Path, prompt: int, generate: Generate) -> None:
    """The last new token is never fed: it needs no position."""
    session, row = Session(folder), [5 + i % 60 for i in range(prompt)]
    new = CONTEXT - prompt + 1
    generated = generate(session, [row], new)[0]
    assert len(generated) == new
    # The tokens are those of a cache that has room to spare.
    short = generate(session, [row[:8]], 4)[0]
    assert generate(session, [row[:8]], 20)[0][:4] == short


@pytest.mark.parametrize("generate", [many, one])
@pytest.mark.parametrize(
    ("prompt", "new"), [(CONTEXT, 2), (CONTEXT + 1, 1), (8, CONTEXT), (400, 9)]
)
def test_beyond_it_one_error_comes_before_any_token(
    folder: Path, prompt: int, new: int, generate: Generate
) -> None:
    session = Session(folder)
    session.session = None  # Nothing may be computed.
    said = rf"{prompt + new - 1} tokens to read .* do not fit the context of {CONTEXT} that"
    with pytest.raises(ValueError, match=said):
        generate(session, [[5] * prompt], new)


@pytest.mark.parametrize("generate", [many, one])
@pytest.mark.parametrize(
    ("row", "new", "message"),
    [
        ([], 4, "a prompt is empty"),
        ([5, -1], 4, "token -1 of a prompt: the model knows those from 0 to "),
        ([5, 10**6], 4, "token 1000000 of a prompt"),
        ([5], 0, "0 new tokens: expected 1 or more"),
        ([5], -3, "-3 new tokens: expected 1 or more"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(
    folder: Path, row: list[int], new: int, message: str, generate: Generate
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(Session(folder), [row], new)


def raw(folder: Path, ids: Any, mask: Any, positions: Any) -> Any:
    """Logits by plain ONNX Runtime."""
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = {i.name: i for i in session.get_inputs()}
    past = {n: i.shape for n, i in inputs.items() if n.startswith("past_key_values.")}
    feed = {n: np.zeros((len(ids), s[1], 0, s[3]), np.float32) for n, s in past.items()}
    feed |= {"input_ids": np.array(ids), "attention_mask": np.array(mask)}
    if "position_ids" in inputs:
        feed["position_ids"] = np.array(positions)
    return session, feed


PADDED = [
    ("left", [[5, 6, 7, 8], [2, 2, 5, 6]], [[1, 1, 1, 1], [0, 0, 1, 1]], slice(2, 4)),
    ("right", [[5, 6, 7, 8], [5, 6, 2, 2]], [[1, 1, 1, 1], [1, 1, 0, 0]], slice(0, 2)),
    ("all rows", [[2, 5, 6, 7], [2, 2, 5, 6]], [[0, 1, 1, 1], [0, 0, 1, 1]], slice(2, 4)),
    ("both sides", [[5, 6, 7, 8], [2, 5, 6, 2]], [[1, 1, 1, 1], [0, 1, 1, 0]], slice(1, 3)),
]


@pytest.mark.parametrize(("side", "ids", "mask", "real"), PADDED, ids=[p[0] for p in PADDED])
def test_plain_onnx_runtime_may_pad_rows_on_either_side(
    folder: Path, side: str, ids: Any, mask: Any, real: slice
) -> None:
    """Prefill and two further tokens with the mask growing, as anyone feeds it; logits lie where
    their tokens are."""
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    session, feed = raw(folder, ids, mask, positions)
    alone, lone = raw(folder, [[5, 6]], [[1, 1]], [[0, 1]])
    names = [o.name for o in session.get_outputs()]
    place = real
    for token in (9, 11, None):
        ours, theirs = (
            dict(zip(names, s.run(names, f), strict=True))
            for s, f in ((session, feed), (alone, lone))
        )
        np.testing.assert_allclose(ours["logits"][1, place], theirs["logits"][0], atol=1e-5)
        for given, got in ((feed, ours), (lone, theirs)):
            given |= {n: got[n.replace("past_key_values", "present")] for n in given if "past" in n}
            rows = len(given["input_ids"])
            given["input_ids"] = np.full((rows, 1), token or 0)
            filled = np.concatenate([given["attention_mask"], np.ones((rows, 1), np.int64)], axis=1)
            given["attention_mask"] = filled
            if "position_ids" in given:
                given["position_ids"] = filled.sum(axis=1, keepdims=True) - 1
        place = slice(0, 1)


def test_our_runtime_leaves_padding_to_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left-padded rows need the logits of one position alone, whatever their lengths."""
    save_source(tmp_path / "slim")
    export_onnx(tmp_path / "slim", tmp_path / "onnx")
    session = Session(tmp_path / "onnx")
    rows = [[5, 6, 7, 8, 9], [11, 12]]
    apart = [generate_tokens(session, [row], max_new_tokens=6)[0] for row in rows]
    starts: list[int] = []
    run = Generation._run

    def seen(state: Generation, tokens: Any, real: Any, start: int) -> Any:
        starts.append(start)
        return run(state, tokens, real, start)

    monkeypatch.setattr(Generation, "_run", seen)
    assert generate_tokens(session, rows, max_new_tokens=6) == apart
    assert starts == [4]


def test_files_from_before_are_fed_rows_padded_on_the_right(tmp_path: Path) -> None:
    """As exported before the graph took any padding: without the node that moves the tokens."""
    stored = Path(__file__).parents[2] / "stored_runs" / "finished" / "onnx"
    session = Session(stored)
    assert session.shared_cache
    assert not session.any_padding
    rows = [[5, 6, 7, 8, 9], [11, 12]]
    apart = [generate_tokens(session, [row], max_new_tokens=6)[0] for row in rows]
    assert generate_tokens(session, rows, max_new_tokens=6) == apart


def test_every_end_token_ends_a_text(tmp_path: Path) -> None:
    """A model that says nothing but its second end token."""
    model = tiny_model("llama", tied=False, vocab_size=400)
    source = save_source(tmp_path / "slim", tied=False, vocab_size=400)
    model.get_output_embeddings().weight.data.zero_()
    model.get_output_embeddings().weight.data[3] = 0
    save_narrow(model, None, tmp_path / "zero")
    (source / "model.safetensors").write_bytes(
        (tmp_path / "zero" / "model.safetensors").read_bytes()
    )
    # All logits are 0, and greedy takes the first: token 0, <s>, is an end here.
    edit(source / "generation_config.json", eos_token_id=[1, 0])
    export_onnx(source, tmp_path / "onnx")
    generator = Generator(tmp_path / "onnx")
    assert generator.ends == {0, 1}
    assert generator.generate(["You may"], max_new_tokens=9) == [""]
    assert "".join(generator.stream("You may", max_new_tokens=9)) == ""
    assert generate_tokens(generator.session, [[5]], max_new_tokens=9, ends=generator.ends) == [[]]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_folder_of_links_as_in_the_hubs_cache_loads(tmp_path: Path, flavour: Any) -> None:
    source = save_source(tmp_path / "slim")
    export_onnx(source, tmp_path / "onnx", flavour=flavour)
    snapshot = as_in_the_hubs_cache(tmp_path / "onnx", tmp_path / "models--a--b")
    expected = generate_tokens(Session(tmp_path / "onnx"), [[5, 6, 7]], max_new_tokens=5)
    assert generate_tokens(Session(snapshot), [[5, 6, 7]], max_new_tokens=5) == expected
    assert Generator(snapshot).tokenizer("may")["input_ids"]
    (snapshot / "model.onnx.data").resolve().unlink()
    with pytest.raises(ValueError, match=r"model\.onnx\.data leads to .*, which is not there"):
        Session(snapshot)


def test_an_empty_stop_text_is_refused_and_ends_nothing_unsaid() -> None:
    assert cut("as it is", ("is", "no")) == "as it "
    with pytest.raises(ValueError, match="stop '': expected a text"):
        cut("as it is", ("is", ""))


def test_a_file_that_is_no_adapter_is_named(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "no adapter"}')
    with pytest.raises(ValueError, match=r"data\.jsonl is no \.onnx_adapter file, or"):
        read_adapter(file, set())


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)])
@pytest.mark.parametrize("generate", [many, one])
def test_logits_that_are_no_numbers_are_an_error(
    tmp_path: Path, generate: Generate, sampling: Sampling
) -> None:
    save_source(tmp_path / "slim")
    export_onnx(tmp_path / "slim", tmp_path / "onnx")
    data = tmp_path / "onnx" / "model.onnx.data"
    data.write_bytes(b"\xff" * data.stat().st_size)
    session = Session(tmp_path / "onnx")
    with pytest.raises(ValueError, match=r"the model's logits are nan: its weights are damaged"):
        generate(session, [[5, 6]], 4, sampling)


@pytest.mark.parametrize(
    "text", ["[1]", "{", "{}", '{"model": 3}', '{"model": {"eos_token_id": {}}}']
)
def test_a_description_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    save_source(tmp_path / "slim")
    export_onnx(tmp_path / "slim", tmp_path / "onnx")
    (tmp_path / "onnx" / "genai_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"genai_config\.json is no genai_config"):
        Session(tmp_path / "onnx")
    (tmp_path / "onnx" / "genai_config.json").unlink()
    assert Session(tmp_path / "onnx").context is None
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())
