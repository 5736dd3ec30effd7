"""Tasks of EleutherAI's lm-evaluation-harness on any form of a model, from data on disk.

Scores equal those of lm-eval's own Hugging Face model with the same prefix token. They vary with
the batch size there (its issues 704 and 1645), so batches are of a fixed size in tokens here.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from huggingface_hub import constants

from atp_edge.data.encoding import document_start, prompt_ids
from atp_edge.evaluation.scoring import LanguageModel, Tokens, batches_of, likelihoods

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ValueError(f"lm-eval tasks: {error}; pip install 'atp-edge[eval]'") from error

# lm-eval's own, where a task does not say how much to generate.
_NEW_TOKENS = 256


class HarnessModel(TemplateLM):
    """A LanguageModel for lm-eval. window: tokens it can read; longer contexts lose their start,
    as in lm-eval itself, which `notes` say.

    A text without context starts as a document does in training. Generation is greedy.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Any, *, window: int, batch_tokens: int = 2048
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.window, self.batch_tokens = window, batch_tokens
        self._cut: set[tuple[int, ...]] = set()

    @property
    def notes(self) -> list[str]:
        """What is to be said of prompts that lost their start so far."""
        said = f"lm-eval prompts longer than the {self.window} tokens that are read, start cut off"
        return [f"{said}: {len(self._cut)}"] if self._cut else []

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return document_start(self.tokenizer)[-1]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        if add_special_tokens is None:
            return prompt_ids(self.tokenizer, string)
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        found = likelihoods(self.model, pairs, batch_tokens=self.batch_tokens)
        return [(one.log, one.greedy) for one in found]

    def _fitted(self, context: Tokens, continuation: Tokens) -> tuple[Tokens, Tokens]:
        """The context's last tokens that fit; the last token of all is predicted, not read."""
        room = self.window + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens does not fit the model's window of "
                f"{self.window}; shorten the task's answers"
            )
        return self._last(context, room), continuation

    def _last(self, context: Tokens, room: int) -> Tokens:
        if len(context) > room:
            self._cut.add(tuple(context))
        return context[-room:]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that do not overlap in what they predict."""
        texts = []
        for request in requests:
            rows = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                self.prefix_token_id,
                self.window,
                1,
            )
            texts.append([(None, *make_disjoint_window(row)) for row in rows])
        logs = iter(self._loglikelihood_tokens([row for rows in texts for row in rows]))
        return [sum(next(logs)[0] for _ in rows) for rows in texts]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to the first of a task's stop strings, which are cut off afterwards."""
        settings = [normalize_gen_kwargs(request.args[1], _NEW_TOKENS) for request in requests]
        if any(kwargs["do_sample"] for kwargs in settings):
            raise ValueError(
                "a task samples (do_sample or a temperature above 0); only greedy generation is "
                "scored: set `do_sample: false` and no temperature in its generation_kwargs"
            )
        by_length: dict[int, list[int]] = {}
        for i, kwargs in enumerate(settings):
            by_length.setdefault(kwargs["max_gen_toks"], []).append(i)
        texts: dict[int, str] = {}
        for new_tokens, places in by_length.items():
            made = self._generate([requests[i].args[0] for i in places], new_tokens)
            texts |= {
                i: postprocess_generated_text(text, settings[i]["until"], None)
                for i, text in zip(places, made, strict=True)
            }
        return [texts[i] for i in range(len(settings))]

    def _generate(self, prompts: Sequence[str], new_tokens: int) -> list[str]:
        """What follows every prompt, batched longest first; prompts lose their start to fit."""
        room = self.window - new_tokens
        if room < 1:
            raise ValueError(
                f"max_gen_toks of {new_tokens} leaves no room for a prompt in the model's window "
                f"of {self.window}; lower it in the task's generation_kwargs"
            )
        rows = [self._last(self.tok_encode(p) or [self.prefix_token_id], room) for p in prompts]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        made: dict[int, list[int]] = {}
        for batch in batches_of(order, lambda i: len(rows[i]) + new_tokens, self.batch_tokens):
            new = self.model.generate(
                [rows[i] for i in batch], new_tokens=new_tokens, end=self.eot_token_id
            )
            made |= dict(zip(batch, new, strict=True))
        return [self.tokenizer.decode(made[i], skip_special_tokens=True) for i in range(len(rows))]


@dataclass(frozen=True, kw_only=True)
class HarnessScore:
    """One metric of one task, as lm-eval aggregates it; error: one standard error, where told.

    higher_is_better: None where neither the task nor lm-eval says. per_item: item by item, where
    the metric is the mean of such. items: that were answered.
    """

    task: str
    metric: str
    value: float
    error: float | None
    higher_is_better: bool | None
    per_item: tuple[float, ...] = ()
    items: int = 0


def load_tasks(names: Sequence[str], include: Path | None) -> list[Any]:
    """lm-eval tasks by name, from the YAML files under `include`, or lm-eval's own without it.

    Nothing is downloaded; data_files are relative to `include`. Raises ValueError naming the task
    that is unknown or whose data are not on disk.
    """
    if include is not None and not include.is_dir():
        raise ValueError(f"--include {include}: expected a folder of lm-eval tasks")
    manager = TaskManager(
        include_path=include and include.resolve(), include_defaults=include is None
    )
    known = manager.all_tasks
    found: dict[str, Any] = {}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
            raise ValueError(
                f"lm-eval task {name!r}: {include or 'lm-eval'} has none of this name; "
                f"expected one like {', '.join(near) or '(there is no task at all)'}"
            )
        try:
            with _offline(), chdir(include or Path()):
                found |= manager.load([name])["tasks"]
        except (OSError, ValueError, DatasetsError) as error:
            raise ValueError(
                f"lm-eval task {name!r} cannot be read from disk: {error}; its data must lie where "
                "its data_files say, relative to the folder of --include"
            ) from error
    return list(found.values())


@contextmanager
def _offline() -> Iterator[None]:
    """No network: both libraries read their environment once, when imported, so set what it set."""
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def harness_scores(model: HarnessModel, tasks: Sequence[Any], *, items: int) -> list[HarnessScore]:
    """Every metric of the tasks, on `items` items of each at most, the same ones always, drawn from
    all of it: those of many tasks lie by subject, and the first are of one."""
    # Without a manager it would read lm-eval's thousands of files to find tasks that are here.
    manager = TaskManager(include_defaults=False)
    with _offline():
        found = simple_evaluate(
            model,
            tasks=list(tasks),
            samples={task.config.task: _drawn(len(task.eval_docs), items) for task in tasks},
            bootstrap_iters=1000,
            log_samples=True,
            task_manager=manager,
        )
    return [
        score
        for task, row in found["results"].items()
        for score in _metrics(
            task, row, found["higher_is_better"].get(task, {}), found["samples"].get(task, ())
        )
    ]


def _drawn(count: int, most: int) -> list[int]:
    """So many of so many items at most, in their order; at no even distance, for items may come in
    turns."""
    return sorted(random.Random(0).sample(range(count), min(count, most)))


def _metrics(
    task: str,
    row: Mapping[str, Any],
    higher_is_better: Mapping[str, bool | None],
    samples: Sequence[Mapping[str, Any]],
) -> Iterator[HarnessScore]:
    """The metrics in a row of lm-eval's results: `acc,none` and its `acc_stderr,none`."""
    for key, value in row.items():
        metric, _, filtered = key.partition(",")
        if filtered and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = row.get(f"{metric}_stderr,{filtered}")
            yield HarnessScore(
                task=task,
                metric=metric if filtered == "none" else f"{metric} ({filtered})",
                value=float(value),
                error=float(error) if isinstance(error, int | float) else None,
                higher_is_better=higher_is_better.get(metric),
                per_item=_per_item(samples, metric, filtered, float(value)),
                items=sum(s["filter"] == filtered for s in samples),
            )


def _per_item(
    samples: Sequence[Mapping[str, Any]], metric: str, filtered: str, value: float
) -> tuple[float, ...]:
    """A metric of every sample; empty where it is no number, or its mean is not the value."""
    found = [s.get(metric) for s in samples if s["filter"] == filtered]
    numbers = [float(x) for x in found if isinstance(x, int | float)]
    told = bool(numbers) and len(numbers) == len(found)
    return tuple(numbers) if told and abs(sum(numbers) / len(numbers) - value) < 1e-6 else ()
