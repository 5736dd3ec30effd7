"""Whether what is said depends more on who is spoken of than before the cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from atp_edge.data.encoding import Encoder
from atp_edge.evaluation.scoring import LanguageModel, likelihoods
from atp_edge.gate.counterfactuals import Pair
from atp_edge.gate.measured_text import BATCH_TOKENS
from atp_edge.gate.results import Check, of_judged
from atp_edge.gate.settings import BiasLimits
from atp_edge.gate.statistics import Difference, Floats, Judged, clustered, judged, judged_family

FEWEST_SUBJECTS = 4


def gaps(model: LanguageModel, tokenizer: Any, pairs: Sequence[Pair]) -> Floats:
    """Nats a token by which the first of every pair is the likelier one [N]."""
    encoder = Encoder(tokenizer)
    rows = [
        encoder.continued(context, text)
        for pair in pairs
        for context, text in zip(pair.contexts, pair.texts, strict=True)
    ]
    found = likelihoods(model, rows, batch_tokens=BATCH_TOKENS)
    means = np.array([one.log / one.tokens for one in found])
    return means[0::2] - means[1::2]


def check_bias(
    pairs: Sequence[Pair], dense: Floats, slim: Floats, limits: BiasLimits, level: float
) -> tuple[list[Check], dict[str, Any]]:
    """The rise of the mean gap's size over all built-in pairs (without any, over all), and of every
    attribute, those of files apart; clustered by the subjects that a pair compares. dense, slim:
    `gaps`."""
    rise = np.abs(slim) - np.abs(dense)
    subjects = np.array([pair.subject for pair in pairs])
    kinds = np.array([pair.kind for pair in pairs])
    built_in = np.array([not pair.source for pair in pairs])

    def difference(chosen: Any) -> Difference:
        return clustered(rise[chosen], np.ones(int(chosen.sum())), subjects[chosen])

    # What is fair in a file makes up for no bias of the built-in pairs.
    of_all = built_in if built_in.any() else ~built_in
    whole = judged(difference(of_all), margin=limits.gap, level=level, fewest=FEWEST_SUBJECTS)
    found: dict[str, Judged] = {}
    for chosen in (built_in, ~built_in):
        family = {str(name): difference(kinds == name) for name in np.unique(kinds[chosen])}
        found |= judged_family(family, margin=limits.attribute, level=level, fewest=FEWEST_SUBJECTS)
    names = sorted(found)
    checks = [
        of_judged(
            "bias", whole, what="gap between counterfactual pairs", unit="nats a token",
            clusters="subjects", dense=_size(dense, of_all), slim=_size(slim, of_all),
        ),
        *(
            of_judged(
                "bias", found[name], what=f"gap between pairs of {name!r}", unit="nats a token",
                clusters="subjects", slice=name, required=False,
            )
            for name in names
        ),
    ]  # fmt: skip
    figures = {
        "pairs": len(pairs),
        **{
            name: {
                "gap": {
                    "dense": _size(dense, kinds == name),
                    "slim": _size(slim, kinds == name),
                },
                "first_preferred": {
                    "dense": float((dense[kinds == name] > 0).mean()),
                    "slim": float((slim[kinds == name] > 0).mean()),
                },
            }
            for name in names
        },
    }
    return checks, figures


def unread_attributes(asked: Sequence[str], read: Sequence[Pair]) -> list[Check]:
    """Undecided: attributes that were asked after and all of whose pairs were left out; and all of
    them together, where no pair is left."""
    missing = sorted(set(asked) - {pair.kind for pair in read})
    named = missing if read or not missing else ["", *missing]
    return [
        Check(
            name="bias", status="undecided", slice=name, required=not name,
            text=f"gap between {f'pairs of {name!r}' if name else 'counterfactual pairs'}: 0 "
            "subjects, all pairs are longer than what ships reads; give shorter ones",
        )
        for name in named
    ]  # fmt: skip


def _size(values: Floats, chosen: Any) -> float:
    return float(np.abs(values[chosen]).mean())
