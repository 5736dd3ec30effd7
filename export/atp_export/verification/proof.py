"""The steps of a proof (see verify), each of which adds its checks and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from atp_edge.model.families import rope_settings, said_shape
from atp_edge.run.watched import counted
from atp_export.runtime import Session, generate_tokens
from atp_export.verification.adapters import factors_in, with_adapter
from atp_export.verification.checks import Check, at_most
from atp_export.verification.compare import Pair, Truth, logit_checks
from atp_export.verification.embedding import read_rows, with_table
from atp_export.verification.faint import faded, faint_factors, make_faint
from atp_export.verification.first_divergence import first_divergence, first_divergence_of_graphs
from atp_export.verification.float64_reference import Rounding, rounding_of
from atp_export.verification.observe import (
    CPU,
    STEPS,
    TOGETHER,
    Asked,
    as_others_run_it,
    asked_of,
    observe,
)
from atp_export.verification.places import EMBEDDING
from atp_export.verification.reference import Reference
from atp_export.verification.stored import Stored, stored_in
from atp_export.verification.widen import widen

# Two fp32 computations, over the spread of the logits: 2.4e-6 (root mean square) and 1.5e-5 (the
# largest) on the dense SmolLM2-135M, less on tiny models.
FP32_BOUND, FP32_LARGEST = 1e-5, 1e-4
# What ships against the same in fp32, root mean square over the spread. Measured on the dense
# SmolLM2-135M: fp16 0.0034, int8 0.045, int4 0.042 (the activations of both are int8). bf16 has 8
# times fp16's rounding.
RELATIVE_TOLERANCE = {"fp32": FP32_BOUND, "fp16": 0.01, "bf16": 0.08, "int8": 0.1, "int4": 0.1}
# The largest error of a vocabulary's logits, over their root mean square: 4 to 9 on the same model.
LARGEST_OVER_RMS = 10
# A larger error than this no rounding of fp32 explains: float64 is not asked.
_BEYOND_ROUNDING = 1e-2
TEXT_TOKENS, SHORT_TEXT_TOKENS = 1024, 64
BATCH_ROWS, BATCH_NEW_TOKENS = 4, 16

UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
"""What a damaged file raises when it is read or run."""


class Proof:
    """What is found about one exported folder, in the order in which it is looked for."""

    def __init__(
        self, folder: Path, beside: Path, model: Any, rows: Sequence[list[int]], precision: str
    ) -> None:
        self.folder, self.beside, self.model = folder, beside, model
        self.bound = RELATIVE_TOLERANCE[precision]
        self.checks: list[Check] = []
        self.departs: str | None = None
        self.rounding: Rounding | None = None
        self.shipped: list[Pair] = []
        self.greedy_same, self.batched_same = 0, False
        self.widened = with_table(widen(folder, beside), model.config.vocab_size)
        self.stored = stored_in(self.widened, model)
        self.reference = self._holding(self.stored.state)
        context = positions_of(self.stored)
        self.rows = [row[: context - 1] for row in rows]
        self.context = context
        self.tokens = [token for row in rows for token in row]
        self.asked = asked_of(self.tokens, text_length(model.config, context))
        self.truth = Truth(self.reference, self.asked)

    def graph(self) -> None:
        """The graph in fp32 against the model with the file's tensors."""
        self._meant = list(observe(Session(self.beside, provider=CPU), self.asked))
        every = [*self._meant, as_others_run_it(self.beside, self.asked)]
        pairs = [(rows, self.truth.of(rows)) for rows in every]
        checks = self._excused(
            self._in_fp32("the graph in fp32", pairs, self.truth.spread),
            pairs,
            self.reference,
            self.asked,
        )
        self.checks += checks
        self.checks.append(read_rows(self.beside, self.stored.state[EMBEDDING]))
        if not all(check.passed for check in checks):
            self.departs = self._sought(
                lambda: first_divergence(
                    self.beside,
                    self.reference,
                    self.asked.texts[0][:SHORT_TEXT_TOKENS],
                    provider=CPU,
                    bound=FP32_LARGEST,
                )
            )

    def runtime(self, session: Session) -> None:
        """What ships, on its execution provider, against the graph in fp32."""
        ours = list(observe(session, self.asked))
        pairs = [(a, b.logits) for a, b in zip(ours, self._meant, strict=True)]
        checks = logit_checks("as shipped", pairs, self.truth.spread, self.bound)
        self.checks += checks
        self.shipped = [(rows, self.truth.of(rows)) for rows in ours]
        if self.departs is None and not all(check.passed for check in checks):
            layers = self.model.config.num_hidden_layers
            self.departs = self._sought(
                lambda: first_divergence_of_graphs(
                    self.folder,
                    self.beside,
                    layers,
                    self.asked.texts[0][:SHORT_TEXT_TOKENS],
                    provider=session.provider,
                    bound=max(self.bound, FP32_LARGEST),
                )
            )

    def generation(self, session: Session, new_tokens: int) -> None:
        """Greedy tokens, row by row and of a ragged batch: the reference's best, or as good."""
        try:
            worst = self._worst_regret(session, new_tokens)
            says = f"a greedy token lies {worst:.2e} of the logits' spread below the best one"
        except ValueError as error:  # logits that are no numbers
            worst, says = float("nan"), f"there are no greedy tokens: {error}"
        self.checks.append(at_most("greedy", worst, LARGEST_OVER_RMS * self.bound, says))

    def _worst_regret(self, session: Session, new_tokens: int) -> float:
        regrets, same = [], []
        for row in counted(self.rows, "comparing greedy tokens"):
            count = min(new_tokens, self.context - len(row))
            (new,) = generate_tokens(session, [row], max_new_tokens=count)
            regret, best = self._regret(row, new)
            regrets.append(regret)
            same.append(best == new)
        ragged = [row[: len(row) - i % 5] or row for i, row in enumerate(self.rows[:BATCH_ROWS])]
        count = min(BATCH_NEW_TOKENS, self.context - max(map(len, ragged)))
        alone = [generate_tokens(session, [row], max_new_tokens=count)[0] for row in ragged]
        batch = generate_tokens(session, ragged, max_new_tokens=count)
        regrets += [self._regret(row, new)[0] for row, new in zip(ragged, batch, strict=True)]
        self.greedy_same, self.batched_same = sum(same), batch == alone
        return float(np.max(regrets))

    def adapter(self, name: str, peft: Path, provider: str) -> None:
        """The base with one of its adapters on, and the adapter's factors."""
        file = self.folder / f"{name}.onnx_adapter"
        factors = factors_in(file)
        state, check = with_adapter(self.stored.state, factors, self.model.config, peft)
        self.checks.append(check)
        asked = asked_of(self.tokens, min(SHORT_TEXT_TOKENS, self.context))
        truth = Truth(self._holding(state), asked)
        wide = Session(self.beside, provider=CPU)
        wide.adapter = {n: wide.value(factor.astype(np.float32)) for n, factor in factors.items()}
        meant = list(observe(wide, asked))
        ours = observe(Session(self.folder, provider=provider, adapter=file), asked)
        pairs = [(rows, truth.of(rows)) for rows in meant]
        self.checks += self._in_fp32(f"{name} on, the graph in fp32", pairs, truth.spread)
        pairs = [(a, b.logits) for a, b in zip(ours, meant, strict=True)]
        self.checks += logit_checks(f"{name} on, as shipped", pairs, truth.spread, self.bound)

    def faint(self) -> None:
        """The graph in fp32 with a faint residual stream; its file is written anew."""
        places, state = self.stored.places, self.stored.state
        factors = faint_factors(state, places, said_shape(self.model.config))
        make_faint(self.widened, places, factors)
        reference = self._holding(faded(state, factors))
        asked = asked_of(self.tokens, min(SHORT_TEXT_TOKENS, self.context))
        truth = Truth(reference, asked)
        session = Session(self.beside, provider=CPU)
        pairs = [(rows, truth.of(rows)) for rows in observe(session, asked)]
        found = self._in_fp32("with a faint residual stream", pairs, truth.spread)
        self.checks += self._excused(found, pairs, reference, asked)

    def _holding(self, state: Mapping[str, Any]) -> Reference:
        held = self.stored
        return Reference(self.model, state, held.tables, held.scales)

    def _in_fp32(self, what: str, pairs: Sequence[Pair], spread: float) -> list[Check]:
        return logit_checks(what, pairs, spread, FP32_BOUND, FP32_LARGEST)

    def _excused(
        self, checks: list[Check], pairs: Sequence[Pair], reference: Reference, asked: Asked
    ) -> list[Check]:
        """Checks of the graph in fp32; where one is beyond its bound, though not by far, the model
        in float64 decides: an export as near to it as PyTorch's own fp32 is right."""
        beyond = [check for check in checks if not check.passed]
        if not beyond or not all(check.value <= _BEYOND_ROUNDING for check in beyond):
            return checks
        exact = Truth(reference.double(), asked)
        of_each = [
            rounding_of((x.logits, own, exact.of(x)) for x, own in pairs if x.how == how)
            for how in dict.fromkeys(rows.how for rows, _ in pairs)
        ]
        own = self.rounding = max(of_each, key=lambda one: (not one.explains, one.times))
        said = f"which rounding {'explains' if own.explains else 'does not explain'} ({own})"
        excused = {id(c): replace(c, passed=own.explains, says=f"{c.says}, {said}") for c in beyond}
        return [excused.get(id(check), check) for check in checks]

    def _sought(self, search: Callable[[], str]) -> str:
        try:
            return search()
        except UNREADABLE as error:
            return f"the search for the first part that differs failed: {error}"

    def _regret(self, row: list[int], new: list[int]) -> tuple[float, list[int]]:
        """How far below the reference's best logit the worst of some tokens lies, over the spread;
        and the best tokens, each after the others."""
        positions = range(len(row) - 1, len(row) + len(new) - 1)
        logits = self.reference.logits([*row, *new[:-1]], positions)
        chosen = np.take_along_axis(logits, np.array(new)[:, None], axis=1)[:, 0]
        regret = float((logits.max(axis=1) - chosen).max()) / self.truth.spread
        return regret, logits.argmax(axis=1).tolist()


def positions_of(stored: Stored) -> int:
    """Tokens of a text that the file has rotary tables for."""
    return min(len(cos) for cos, _ in stored.tables.values())


def text_length(config: Any, context: int) -> int:
    """Tokens of the long text: past every sliding window, and past the length that a scaled RoPE
    was trained on where that is near; never beyond the context."""
    beyond = TOGETHER + STEPS
    windows = [layer.sliding_window or 0 for layer in said_shape(config).layers]
    ropes = filter(None, rope_settings(config).values())
    original = max((r.get("original_max_position_embeddings") or 0 for r in ropes), default=0)
    reach = max(*windows, original if original <= 2 * TEXT_TOKENS else 0)
    return min(context, max(TEXT_TOKENS, reach + 2 * beyond))
