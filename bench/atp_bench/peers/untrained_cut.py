"""A dense model cut without training: latency follows from widths, not from values."""

from __future__ import annotations

from pathlib import Path

from atp_edge.config import WidthsPolicy
from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.families import ModelShape, model_shape
from atp_edge.model.loading import load_model, load_tokenizer
from atp_edge.model.narrow import narrow_model
from atp_edge.model.plan import Plan, all_kept, narrow_shape, plan_of, shares
from atp_edge.model.structures import count_parameters, fixed_layer_parameters, sites_of

_MULTIPLE = 32


def cut_plan(shape: ModelShape, share: float, policy: WidthsPolicy) -> Plan:
    """A plan that keeps at most `share` of the decoder's parameters, MLP widths multiples of 32.

    uniform: every KV group stays, all MLPs alike. per-layer: every third layer loses a KV group
    (where it has two or more), and MLP widths differ by up to a third around their mean.
    Raises ValueError when attention alone is more than the share.
    """
    attention, mlp = sites_of(shape)[0::2], sites_of(shape)[1::2]
    spread = policy == "per-layer"
    groups = [s.size - (spread and s.size > 1 and s.layer % 3 == 0) for s in attention]
    room = share * count_parameters(shape).decoder - fixed_layer_parameters(shape)
    room -= sum(n * s.unit_parameters for n, s in zip(groups, attention, strict=True))
    mean = room / sum(s.unit_parameters for s in mlp)
    if mean < _MULTIPLE:
        raise ValueError(f"a share of {share} leaves no room for MLPs; give a larger one")
    # 7 and 11 have no common divisor: the offsets -5 .. 5 come in turn, in no order of depth.
    wanted = [mean * (1 + (((i * 7) % 11) - 5) / 15 * spread) for i in range(len(mlp))]
    widths = [
        min(int(w) // _MULTIPLE * _MULTIPLE, s.size) for w, s in zip(wanted, mlp, strict=True)
    ]
    kept = []
    for n, width in zip(groups, widths, strict=True):
        kept += [tuple(range(n)), tuple(range(width))]
    return plan_of(shape, kept)


def cut(dense: Path, out: Path, share: float, policy: WidthsPolicy) -> float:
    """Write a cut checkpoint of a Hugging Face folder; returns the share it kept."""
    model = load_model(dense)
    shape = model_shape(model.config)
    plan = all_kept(shape) if share >= 1 else cut_plan(shape, share, policy)
    save_narrow(narrow_model(model, plan), load_tokenizer(dense), out)
    return shares(shape, narrow_shape(shape, plan)).decoder
