"""Loss and divergence on the run's own text, and slice by slice on that and on further text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from atp_edge.gate.measured_text import Measured
from atp_edge.gate.results import Check, of_judged
from atp_edge.gate.settings import QualityLimits
from atp_edge.gate.statistics import Difference, clustered, judged, judged_family

_SHOWN = 20


def check_quality(
    measured: Measured,
    limits: QualityLimits,
    level: float,
    further: Measured | None = None,
    unread: Sequence[str] = (),
) -> tuple[list[Check], dict[str, Any]]:
    """Loss against its margin, KL against its limit, every slice against the slices' margin.

    measured: the run's own text; what is easy in `further` cannot make up for a loss there.
    unread: slices of both of which no document is read.
    """
    tokens, fewest = measured.tokens, limits.fewest_documents
    dense, slim = (measured.by_text(nats) for nats in measured.nats)
    everything = np.ones(len(tokens), bool)
    loss = judged(
        difference_in(slim - dense, tokens, everything),
        margin=limits.loss, level=level, fewest=fewest,
    )  # fmt: skip
    kl = judged(
        difference_in(measured.by_text(measured.kl), tokens, everything),
        margin=limits.kl, level=level, fewest=fewest,
    )  # fmt: skip
    perplexities = [float(np.exp(nats.sum() / tokens.sum())) for nats in (dense, slim)]
    checks = [
        of_judged(
            "loss", loss, what="loss on text over the dense model's", unit="nats a token",
            dense=perplexities[0], slim=perplexities[1],
        ),
        of_judged("kl", kl, what="KL divergence from the dense model", unit="nats a token"),
        # Of one slice alone there is nothing more to say.
        *(check_slices(measured, limits, level) if len({*measured.slices, *unread}) > 1 else ()),
        *(check_slices(further, limits, level) if further else ()),
        *unread_slices(unread),
    ]  # fmt: skip
    figures = {
        "perplexity": {"dense": perplexities[0], "slim": perplexities[1]},
        "kl": kl.difference.mean,
        "same_likeliest_token": float(measured.same_top.mean()),
        "documents": len(tokens),
        "tokens": int(tokens.sum()),
    }
    return checks, figures


def check_slices(measured: Measured, limits: QualityLimits, level: float) -> list[Check]:
    """A check of the loss on every slice."""
    dense, slim = (measured.by_text(nats) for nats in measured.nats)
    of = np.array(measured.slices)
    family = {
        name: difference_in(slim - dense, measured.tokens, of == name)
        for name in sorted(set(measured.slices))
    }
    found = judged_family(
        family, margin=limits.slice_loss, level=level, fewest=limits.fewest_documents
    )
    return [
        of_judged(
            "loss", one, what=f"loss on {name!r}", unit="nats a token", slice=name, required=False
        )
        for name, one in found.items()
    ]


def unread_slices(names: Sequence[str]) -> list[Check]:
    """Slices without a document are undecided: the first of them by name, the others by count."""
    shown = {name: repr(name) for name in names[:_SHOWN]}
    if others := names[_SHOWN:]:
        shown[f"{len(others)} more"] = f"{len(others)} more slices"
    return [
        Check(
            name="loss", status="undecided", slice=name, required=False,
            text=f"loss on {said}: 0 documents are read; give more text, or more of them "
            "(quality.documents)",
        )
        for name, said in shown.items()
    ]  # fmt: skip


def difference_in(worse: Any, tokens: Any, chosen: Any) -> Difference:
    """Of the chosen documents, each a cluster: nats more a token."""
    return clustered(worse[chosen], tokens[chosen], np.flatnonzero(chosen))
