"""Dense, slim and ONNX of a run on the domain's own tasks, and on lm-eval's, side by side.

`atp-edge bench tasks --out RUN --json FILE` writes the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from atp_export.runtime import Session
from atp_export.runtime.described import described
from rich.table import Table

from atp_bench.onnx_model import OnnxModel
from atp_edge.config import Config
from atp_edge.data.encoding import Encoder
from atp_edge.evaluation.fitting import Fits, fitting
from atp_edge.evaluation.items import Task
from atp_edge.evaluation.recovery import Recovery, recovery
from atp_edge.evaluation.scoring import LanguageModel, TorchModel
from atp_edge.evaluation.task_scores import TaskScore, evaluate
from atp_edge.evaluation.tasks import domain_tasks
from atp_edge.model.checkpoint import load_narrow
from atp_edge.model.families import longest_text
from atp_edge.model.loading import load_config
from atp_edge.run.folder import RunFolder
from atp_edge.run.progress import Progress
from atp_edge.training.setup import corpus_of, documents_by_split, tokenizer_of

if TYPE_CHECKING:  # lm-eval is an extra
    from atp_bench.lm_eval_adapter import HarnessScore


def tasks_of(config: Config, items: int, window: int) -> tuple[list[Task], list[str]]:
    """The domain's tasks from the documents of the run's own test split; and what is to be said of
    items that are left out, for they are longer than what is read at once (window, tokens).

    Raises ValueError where no item is left.
    """
    tokenizer = tokenizer_of(config)
    parts = documents_by_split(config, tokenizer, corpus_of(config, tokenizer).documents)
    every = domain_tasks(
        config.data, parts["test"], train=parts["train"], items=items, seed=config.seed
    )
    tasks, notes = fitting(every, Fits(Encoder(tokenizer), window))
    if not tasks:
        raise ValueError(f"tasks of {config.data!r}: nothing is left to ask ({notes[0]})")
    return tasks, notes


def recovery_where_able(dense: Mapping[str, TaskScore], slim: Mapping[str, TaskScore]) -> Recovery:
    """Recovery over the tasks that the dense model can do at all: the others tell nothing."""
    able = [name for name, score in dense.items() if score.value > 0]
    return recovery({n: dense[n] for n in able}, {n: slim[n] for n in able})


@dataclass(frozen=True, kw_only=True)
class RunScores:
    """Scores by form (dense, slim, onnx), then by task.

    outside: of lm-eval's tasks, by `task metric`. recovery: of slim and of onnx against dense, on
    the domain's tasks.
    """

    domain: Mapping[str, Mapping[str, TaskScore]]
    outside: Mapping[str, Mapping[str, HarnessScore]]
    recovery: Mapping[str, Recovery]


def score_run(
    run: RunFolder, progress: Progress, *, items: int, outside: Sequence[Any] = ()
) -> RunScores:
    """Score the three forms of a run on the same items: dense and slim in fp32, ONNX as exported.

    outside: tasks of `lm_eval_adapter.load_tasks`. Raises ValueError when a form is not there yet.
    """
    config, forms = run.config(), _forms(run)
    # One window, so that all forms read the same: the exported context may be the shorter one.
    positions = longest_text(load_config(run.dense))
    window = min(positions, described(run.onnx).context or positions)
    tokenizer, (tasks, notes) = tokenizer_of(config), tasks_of(config, items, window)
    for note in notes:
        progress.say(note)
    cut: list[str] = []

    # A function, so that one form's memory is free before the next is loaded.
    def scored(model: LanguageModel) -> tuple[dict[str, TaskScore], dict[str, HarnessScore]]:
        found = evaluate(model, tokenizer, tasks)
        if not outside:
            return found, {}
        from atp_bench.lm_eval_adapter import HarnessModel, harness_scores

        harness = HarnessModel(model, tokenizer, window=window)
        theirs = harness_scores(harness, outside, items=items)
        cut.extend(harness.notes)
        return found, {f"{s.task} {s.metric}": s for s in theirs}

    scores = {}
    for form, load in forms.items():
        progress.say(f"scoring {form} on {len(tasks) + len(outside)} tasks")
        scores[form] = scored(load())
    for note in dict.fromkeys(cut):
        progress.say(note)
    domain = {form: score[0] for form, score in scores.items()}
    return RunScores(
        domain=domain,
        outside={form: score[1] for form, score in scores.items()},
        recovery={f: recovery_where_able(domain["dense"], domain[f]) for f in ("slim", "onnx")},
    )


def _forms(run: RunFolder) -> dict[str, Callable[[], LanguageModel]]:
    """How to load every form. Raises ValueError for one that no stage has written."""
    run.require("dense", "slim", "onnx")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "dense": lambda: TorchModel(load_narrow(run.dense).to(device)),
        "slim": lambda: TorchModel(load_narrow(run.slim).to(device)),
        "onnx": lambda: OnnxModel(Session(run.onnx)),
    }


def table(scores: RunScores) -> Table:
    """A row a task, at 80 columns; 95 % intervals under the figures."""
    shown = Table(title="tasks, with 95 % intervals", title_justify="left")
    shown.add_column("task", overflow="fold")
    for name in ("chance", "dense", "slim", "ONNX", "recovery"):
        shown.add_column(name, justify="right")
    dense, slim = scores.domain["dense"], scores.domain["slim"]
    for name, of_dense in dense.items():
        figures = [
            _figure(rows[name].value, rows[name].interval) for rows in scores.domain.values()
        ]
        kept = ""
        if of_dense.value > 0:
            one = recovery({name: of_dense}, {name: slim[name]})
            kept = _figure(one.average, one.interval)
        shown.add_row(name, f"{of_dense.chance:.3f}", *figures, kept)
    averages = [_figure(r.average, r.interval) for r in scores.recovery.values()]
    shown.add_row("average recovery", "", "", *averages, "", style="bold")
    for name in scores.outside["dense"]:
        shown.add_row(f"lm-eval: {name}", "", *_outside([s[name] for s in scores.outside.values()]))
    return shown


def _outside(forms: Sequence[HarnessScore]) -> list[str]:
    """Figures of one metric (1.96 standard errors each way) and slim over dense, where it is said
    which way is better."""
    dense, slim = forms[0].value, forms[1].value
    above, below = (slim, dense) if forms[0].higher_is_better else (dense, slim)
    reach = [1.96 * s.error if s.error is not None else None for s in forms]
    return [
        *(
            _figure(s.value, None if r is None else (s.value - r, s.value + r))
            for s, r in zip(forms, reach, strict=True)
        ),
        _figure(above / below) if below and forms[0].higher_is_better is not None else "",
    ]


def _figure(value: float, interval: tuple[float, float] | None = None) -> str:
    if interval is None:
        return f"{value:.3f}"
    return f"{value:.3f}\n{interval[0]:.2f}-{interval[1]:.2f}"
