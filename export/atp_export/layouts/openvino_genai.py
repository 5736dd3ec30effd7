"""The folder that openvino_genai loads: an IR whose cache is state, and the tokenizer as an IR.

Its LLMPipeline feeds `beam_idx`, the row of the last step that each row goes on from, and expects
the cache inside the model (openvino.genai, src/cpp/src/llm/pipeline_stateful.cpp).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atp_edge.model.loading import GENERATION, load_tokenizer
from atp_edge.run.files import read_json, write_json
from atp_export.runtime import Generation, Session
from atp_export.runtime.described import DESCRIPTION, described
from atp_export.runtime.generation import Floats
from atp_export.verification.checks import Check, at_most, none_of

PACKAGES = ("openvino", "openvino_tokenizers", "openvino_genai")
PRECISIONS = ("fp32", "fp16", "int8", "int4")
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
"""Else a CPU with bf16 instructions computes in bf16."""
PAST, PRESENT = "past_key_values", "present"
TIE = {"fp32": 0.01, "fp16": 0.05, "int8": 0.2, "int4": 0.2}
"""How far below the best logit of ONNX Runtime one may lie that openvino_genai took, over the
logits' spread. Beside int8 and int4 weights ONNX Runtime's activations are 8 bits."""
TEXTS = (
    "In 2024 it cost 1,234.50 dollars; I'LL pay 3.14159% of it, don't you?",
    "def f(x):\n    return {'a': x ** 2}\t# tabs\n\n  and   spaces",
    "Füße, naïve façade, Ελληνικά, русский, 日本語の文章, العربية, 😀👍🏽",
)
"""Where converted tokenizers differ: digits, contractions, white space, scripts."""


def check_openvino(flavour: str, precision: str, *, keep_adapter: bool) -> None:
    """Raise ValueError for what has no such folder, or where its packages are not installed."""
    if flavour != "portable":
        raise ValueError(f"--layout openvino with --flavour {flavour}: it is made from portable")
    if precision not in PRECISIONS:
        raise ValueError(
            f"--layout openvino with {precision}: expected one of {', '.join(PRECISIONS)}"
        )
    if keep_adapter:
        raise ValueError(
            "export.keep_adapter left LoRA apart, which openvino_genai's folder has no place for; "
            "train without it"
        )
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--layout openvino needs {', '.join(missing)}: pip install 'atp-edge[openvino]'"
        )


def to_openvino(folder: Path) -> Path:
    """Write beside model.onnx what openvino_genai loads; returns the path of openvino_model.xml.

    Raises ValueError for a tokenizer that openvino_tokenizers cannot convert.
    """
    import openvino as ov

    _write_tokenizer(folder)
    model = ov.Core().read_model(folder / "model.onnx")
    _keep_cache_inside(model)
    path = folder / "openvino_model.xml"
    ov.save_model(model, path, compress_to_fp16=False)
    ends = sorted(described(folder).ends)
    settings = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    write_json(folder / GENERATION, settings | ({"eos_token_id": ends} if ends else {}))
    return path


def without_onnx(folder: Path) -> None:
    """Take away what openvino_genai does not read. The manifest is the caller's to write again."""
    for name in ("model.onnx", "model.onnx.data", DESCRIPTION):
        (folder / name).unlink()


def _write_tokenizer(folder: Path) -> None:
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer

    try:
        encoder, decoder = convert_tokenizer(load_tokenizer(folder), with_detokenizer=True)
    except Exception as error:
        raise ValueError(
            f"openvino_tokenizers cannot convert the tokenizer of {folder} "
            f"({type(error).__name__}: {error}); use another layout"
        ) from error
    ov.save_model(encoder, folder / "openvino_tokenizer.xml")
    ov.save_model(decoder, folder / "openvino_detokenizer.xml")


def _keep_cache_inside(model: Any) -> None:
    """Make the cache's inputs and outputs state, reordered by `beam_idx` before it is read."""
    import openvino as ov
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    rows = opset13.parameter(ov.PartialShape([-1]), ov.Type.i32, name="beam_idx")
    rows.output(0).get_tensor().add_names({"beam_idx"})
    model.add_parameters([rows])
    pairs = {}
    for past in model.inputs:
        name = past.get_any_name()
        if name.startswith(PAST):
            readers = list(past.get_target_inputs())
            kept = opset13.gather(past, rows, opset13.constant(0, ov.Type.i64))
            for reader in readers:
                reader.replace_source_output(kept.output(0))
            pairs[name] = name.replace(PAST, PRESENT)
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, pairs)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """ids: of texts, by the converted tokenizer; tokens: greedy ones after prompts."""

    ids: list[list[int]]
    tokens: list[list[int]]


def ask(folder: Path, *, texts: Sequence[str], prompts: Sequence[str], new_tokens: int) -> Answers:
    """What openvino_genai makes of a folder on the CPU, with its own tokenizer and generate."""
    import openvino_genai as genai

    pipeline = genai.LLMPipeline(folder, "CPU", **EXACT)
    tokenizer = pipeline.get_tokenizer()
    settings = genai.GenerationConfig()
    settings.max_new_tokens, settings.ignore_eos = new_tokens, True
    made = [pipeline.generate(tokenizer.encode(p), settings).tokens[0] for p in prompts]
    return Answers(
        ids=[tokenizer.encode(text).input_ids.data[0].tolist() for text in texts],
        tokens=[list(map(int, tokens)) for tokens in made],
    )


def prove_openvino(
    folder: Path, tokenizer: Any, prompts: Sequence[str], *, precision: str, new_tokens: int
) -> tuple[Check, ...]:
    """openvino_genai's ids and greedy tokens beside the tokenizer's and those of model.onnx.

    Every token that it took has to be the file's best one, or about as good. new_tokens: at most,
    as the context has room.
    """
    session, texts = Session(folder), (*TEXTS, *prompts)
    own = [tokenizer(text)["input_ids"] for text in texts]
    if session.context is not None:
        new_tokens = min(new_tokens, session.context + 1 - max(map(len, own[len(TEXTS) :])))
    answers = ask(folder, texts=texts, prompts=prompts, new_tokens=new_tokens)
    faults = [
        repr(text[:40])
        for text, ids, theirs in zip(texts, own, answers.ids, strict=True)
        if ids != theirs
    ]
    return (
        none_of("ids", faults, "text that the converted tokenizer splits otherwise"),
        _greedy(session, own[len(TEXTS) :], answers.tokens, TIE[precision]),
    )


def _greedy(
    session: Session, rows: Sequence[list[int]], taken: Sequence[list[int]], tie: float
) -> Check:
    worst, says = 0.0, "every greedy token is the file's best"
    for i, (row, made) in enumerate(zip(rows, taken, strict=True)):
        below = below_best(session, row, made)
        if float(below.max()) > worst:
            worst, at = float(below.max()), int(below.argmax())
            says = f"prompt {i}: its new token {at} lies {worst:.2g} spreads below the file's best"
    return at_most("greedy", worst, tie, says)


def below_best(
    session: Session, row: Sequence[int], made: Sequence[int], barred: Collection[int] = ()
) -> Floats:
    """[len(made)]: how far below the best logit after a prompt and the tokens before it each token
    lies, over the logits' spread; inf where one is no number.

    barred: tokens that whoever made them could not take, best or not.
    """
    fed = np.array([[*row, *made[:-1]]], np.int64)
    logits = Generation(session, 1, fed.shape[1]).step(fed, first=len(row) - 1)[0]
    taken, spread = logits[np.arange(len(made)), made], logits.std()
    unable = np.array(sorted(barred), np.int64)
    logits[np.ix_(~np.isin(made, unable), unable)] = -np.inf
    below = (logits.max(1) - taken) / spread
    return np.nan_to_num(below, nan=np.inf, posinf=np.inf)
