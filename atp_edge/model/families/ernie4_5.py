"""ERNIE 4.5, dense: Llama whose RoPE turns neighbours."""

from typing import Any

from atp_edge.model.families.record import (
    ATTENTION_PROJECTIONS,
    MLP_PROJECTIONS,
    Biased,
    Family,
    Layout,
)


def _biased(config: Any) -> Biased:
    return frozenset((*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS) if config.use_bias else ())


FAMILY = Family(
    model_type="ernie4_5",
    layout=Layout(interleaved=True),
    biased=_biased,
    reads=("use_bias",),
)
