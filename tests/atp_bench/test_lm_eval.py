"""Tiny models through lm-eval: any form scores as lm-eval's own model does, from local data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from atp_bench import lm_eval_adapter
from atp_bench.lm_eval_adapter import HarnessModel, harness_scores, load_tasks
from atp_bench.onnx_model import OnnxModel
from atp_export.export import export_onnx
from atp_export.runtime import Session
from transformers import AutoTokenizer, PreTrainedModel

from atp_edge.evaluation.items import ChoiceItem, ChoiceTask, Option, TextItem, TextTask
from atp_edge.evaluation.scoring import LanguageModel, TorchModel, likelihoods
from atp_edge.evaluation.task_scores import evaluate
from atp_edge.model.checkpoint import save_narrow
from tests.tiny import tiny_model
from tests.tiny_tokenizers import tokenizer_of

WINDOW = 64
CHOICE = """
task: contracts
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITE = """
task: clauses
dataset_path: json
dataset_kwargs: {data_files: {test: write.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
task: text
dataset_path: json
dataset_kwargs: {data_files: {test: write.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture(scope="module")
def tokenizer(real_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(real_folder)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> PreTrainedModel:
    made = tiny_model("llama", tied=True, vocab_size=len(tokenizer), max_position_embeddings=WINDOW)
    made.generation_config.eos_token_id = tokenizer.eos_token_id
    return made


@pytest.fixture(scope="module")
def onnx(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    folder = tmp_path_factory.mktemp("onnx")
    save_narrow(model, None, folder / "slim")
    export_onnx(folder / "slim", folder / "onnx")
    return OnnxModel(Session(folder / "onnx", threads=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks and their data; one question is longer than the window."""
    made = tmp_path_factory.mktemp("tasks")
    for name, text in (("choice", CHOICE), ("write", WRITE), ("rolling", ROLLING)):
        (made / f"{name}.yaml").write_text(text)
    questions = [f"{'The licensee may copy work ' * n}number {n}:" for n in (1, 2, 3, 4, 5, 6, 30)]
    rows = [
        {"question": q, "options": ["royalties", "no fee", f"term {i}"], "answer": i % 3}
        for i, q in enumerate(questions)
    ]
    (made / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (made / "write.jsonl").write_text(
        "\n".join(json.dumps({"question": q, "answer": "x"}) for q in questions)
    )
    return made


def scored(model: LanguageModel, tokenizer: Any, tasks: list[Any]) -> dict[tuple[str, str], float]:
    harness = HarnessModel(model, tokenizer, window=WINDOW, batch_tokens=256)
    return {(s.task, s.metric): s.value for s in harness_scores(harness, tasks, items=7)}


def test_items_are_drawn_from_all_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of BBQ, which lies by category, the first two hundred are all of one."""
    asked: list[dict[str, list[int]]] = []

    def evaluated(*_: Any, samples: dict[str, list[int]], **__: Any) -> dict[str, Any]:
        asked.append(samples)
        return {"results": {}, "higher_is_better": {}, "samples": {}}

    monkeypatch.setattr(lm_eval_adapter, "simple_evaluate", evaluated)
    task = SimpleNamespace(config=SimpleNamespace(task="t"), eval_docs=range(800))
    model: Any = None
    for items in (200, 200, 800, 900):
        assert harness_scores(model, [task], items=items) == []
    few, again, *whole = (of["t"] for of in asked)
    assert few == again == sorted(set(few))
    assert len(few) == 200
    assert {at // 200 for at in few} == {at % 4 for at in few} == {0, 1, 2, 3}
    assert whole == [[*range(800)]] * 2


def requests(folder: Path, name: str) -> list[Any]:
    """The requests a task makes of a model."""
    task = load_tasks([name], folder)[0]
    task.build_all_requests(limit=None, rank=0, world_size=1)
    made: list[Any] = task.instances
    return made


def test_onnx_answers_the_domains_tasks_as_torch_does(
    model: PreTrainedModel, onnx: OnnxModel, tokenizer: Any
) -> None:
    words = ("royalties", "no fee", "the term", "a notice")
    options = tuple(Option(prompt=f"The {w} of", text=f" {w} are due") for w in words)
    tasks = [
        ChoiceTask(name="c", scoring="sum", items=tuple(
            ChoiceItem(options=options[i:] + options[:i], answer=1) for i in range(4))),
        TextTask(name="t", items=tuple(TextItem(prompt=w, reference=f"{w} due") for w in words)),
    ]  # fmt: skip
    theirs, ours = (evaluate(m, tokenizer, tasks, batch_tokens=64) for m in (model, onnx))
    assert {n: s.per_item for n, s in ours.items()} == {n: s.per_item for n, s in theirs.items()}
    pairs = [(tokenizer(o.prompt)["input_ids"], tokenizer(o.text)["input_ids"]) for o in options]
    for a, b in zip(
        likelihoods(TorchModel(model), pairs, batch_tokens=64),
        likelihoods(onnx, pairs, batch_tokens=64),
        strict=True,
    ):
        assert a.log == pytest.approx(b.log, abs=1e-3)


@pytest.mark.parametrize("name", ["contracts", "clauses", "text"])
def test_every_request_is_answered_as_lm_evals_own_model_answers_it(
    name: str, model: PreTrainedModel, onnx: OnnxModel, tokenizer: Any, folder: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    end = tokenizer.eos_token_id
    own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, prefix_token_id=end)
    asked = requests(folder, name)
    kind = asked[0].request_type
    expected = getattr(own, kind)(asked)
    for form in (TorchModel(model), onnx):
        harness = HarnessModel(form, tokenizer, window=WINDOW, batch_tokens=256)
        found = getattr(harness, kind)(asked)
        if kind == "generate_until":
            assert found == expected
            assert any(expected)
        elif kind == "loglikelihood":
            assert [f[0] for f in found] == pytest.approx([e[0] for e in expected], abs=1e-3)
            assert [f[1] for f in found] == [e[1] for e in expected]
        else:
            assert found == pytest.approx(expected, abs=1e-2)


def test_simple_evaluate_gives_torch_and_onnx_the_same_scores(
    model: PreTrainedModel, onnx: OnnxModel, tokenizer: Any, folder: Path
) -> None:
    tasks = load_tasks(["contracts", "clauses"], folder)
    torch_scores = scored(TorchModel(model), tokenizer, tasks)
    metrics = {"contracts": {"acc", "acc_norm"}, "clauses": {"exact_match"}}
    assert set(torch_scores) == {(t, m) for t in metrics for m in metrics[t]}
    assert scored(onnx, tokenizer, tasks) == pytest.approx(torch_scores, rel=1e-3)
    assert 0 < torch_scores["contracts", "acc"] < 1


@pytest.mark.parametrize(
    ("arguments", "kwargs", "message"),
    [
        (("x", " y " * 70), {}, "does not fit the model's window of 64"),
        (("x", {"max_gen_toks": 64}), {}, "leaves no room for a prompt"),
        (("x", {"temperature": 0.5}), {}, "a task samples"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    arguments: Any, kwargs: Any, message: str, model: PreTrainedModel, tokenizer: Any
) -> None:
    harness = HarnessModel(TorchModel(model), tokenizer, window=WINDOW)
    request = [SimpleNamespace(args=arguments)]
    answer = harness.loglikelihood if isinstance(arguments[1], str) else harness.generate_until
    with pytest.raises(ValueError, match=message):
        answer(request)


def test_missing_tasks_and_data_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'contract'.*expected one like contracts"):
        load_tasks(["contract"], folder)
    with pytest.raises(ValueError, match="expected a folder"):
        load_tasks(["contracts"], tmp_path / "nowhere")
    (tmp_path / "choice.yaml").write_text(CHOICE)
    with pytest.raises(ValueError, match=r"'contracts' cannot be read from disk: .*choice\.jsonl"):
        load_tasks(["contracts"], tmp_path)
    (tmp_path / "choice.jsonl").write_text("{no json")
    with pytest.raises(ValueError, match="'contracts' cannot be read from disk"):
        load_tasks(["contracts"], tmp_path)
    (tmp_path / "choice.yaml").write_text(CHOICE.replace("path: json", "path: someone/somewhere"))
    with pytest.raises(
        ValueError, match=r"'contracts' cannot be read from disk: .*someone/somewhere"
    ):
        load_tasks(["contracts"], tmp_path)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "atp_bench.lm_eval_adapter")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'atp-edge\[eval\]'"):
        __import__("atp_bench.lm_eval_adapter")


def test_texts_start_as_documents_do_in_training() -> None:
    for bos in (True, False):
        tokenizer = tokenizer_of("llama-3", bos=bos)
        harness = HarnessModel(TorchModel(tiny_model("llama")), tokenizer, window=WINDOW)
        first = tokenizer.bos_token_id if bos else tokenizer.eos_token_id
        assert harness.prefix_token_id == first
        plain = harness.tok_encode("May I?", add_special_tokens=False)
        assert harness.tok_encode("May I?") == ([first, *plain] if bos else plain)
        assert harness.tok_encode("<s>May I?").count(tokenizer.bos_token_id) == 1
