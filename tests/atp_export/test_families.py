"""Every family that is described in `atp_edge.model.families`: masked == narrow == ONNX.

The first four families are in the tests of each part as well. A new family is one line in
`tests.tiny.NEW_FAMILIES`.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from atp_export.export import export_onnx
from atp_export.verification.verify import verify
from onnx.reference import ReferenceEvaluator
from transformers import PreTrainedModel

from atp_edge.config import Flavour
from atp_edge.masking.apply import set_decision
from atp_edge.model.checkpoint import load_narrow, save_narrow
from atp_edge.model.families import FAMILIES, model_shape
from atp_edge.model.narrow import merge, narrow_model, narrow_peft
from atp_edge.model.plan import all_kept, narrow_shape
from atp_edge.model.structures import count_parameters
from tests.atp_export.test_onnx import PROMPTS, Numbers
from tests.tiny import FAMILIES as FIRST
from tests.tiny import IDS, NEW_FAMILIES, PLANS, logits, masks_of, tiny_model, with_lora

FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
ONNX_ALONE = ("standard", "portable")
LOWER = ("fp16", "int8", "int4")


@cache
def narrow(family: str, policy: str) -> PreTrainedModel:
    dense = tiny_model(family, tied=policy == "uniform")
    return narrow_model(dense, PLANS[policy](dense))


def test_every_family_has_a_line() -> None:
    made = {config.model_type for config, _ in (FIRST | NEW_FAMILIES).values()}
    assert made == set(FAMILIES)


@pytest.mark.parametrize("policy", PLANS)
@pytest.mark.parametrize("family", NEW_FAMILIES)
def test_masked_equals_narrow_and_its_checkpoint(tmp_path: Path, family: str, policy: str) -> None:
    dense = tiny_model(family, tied=policy == "uniform")
    plan = PLANS[policy](dense)
    whole = logits(dense)
    kept = narrow_model(dense, all_kept(model_shape(dense.config)))
    assert torch.equal(logits(kept), whole)
    masked = with_lora(dense)
    set_decision(masked, [mask.float() for mask in masks_of(plan)], "whole")
    expected = logits(masked)
    assert (expected - whole).abs().max() > 0.1
    set_decision(masked, masks_of(plan), "whole")  # what is removed is not computed
    torch.testing.assert_close(logits(masked), expected, atol=1e-4, rtol=1e-4)
    slim = narrow_peft(masked, plan)
    torch.testing.assert_close(logits(slim), expected, atol=1e-4, rtol=1e-4)
    merged = merge(slim)
    shape = model_shape(merged.config)
    assert count_parameters(shape).whole == sum(p.numel() for p in merged.parameters())
    assert shape == narrow_shape(model_shape(dense.config), plan)
    save_narrow(merged, None, tmp_path / "slim")
    loaded = load_narrow(tmp_path / "slim")
    assert model_shape(loaded.config) == shape
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
    pairs = zip(loaded.state_dict().values(), merged.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    set_decision(masked, None, "whole")
    assert (logits(masked) - expected).abs().max() > 0.1


def export(tmp_path: Path, model: PreTrainedModel, flavour: Flavour, **options: Any) -> Path:
    save_narrow(model, None, tmp_path / "slim")
    export_onnx(tmp_path / "slim", tmp_path / "onnx", flavour=flavour, **options)
    return tmp_path / "onnx"


def check_onnx(tmp_path: Path, family: str, policy: str, flavour: Flavour, precision: Any) -> None:
    model = narrow(family, policy)
    folder = export(tmp_path, model, flavour, precision=precision)
    report = verify(folder, model, Numbers(), PROMPTS, new_tokens=12, precision=precision)
    assert report.passed, report


# A family meets two flavours in fp32, each in one policy, and one lower precision of the third: all
# else is `large`.
CELLS = list(itertools.product([*FIRST, *NEW_FAMILIES], PLANS, FLAVOURS, ("fp32", *LOWER)))
SHORT = set()
for i, family in enumerate(NEW_FAMILIES):
    policies, flavours = list(PLANS), FLAVOURS[i % 3 :] + FLAVOURS[: i % 3]
    SHORT |= {(family, policies[i % 2], flavours[0], "fp32")}
    SHORT |= {(family, policies[1 - i % 2], flavours[1], "int4")}


@pytest.mark.parametrize(
    ("family", "policy", "flavour", "precision"), [cell for cell in CELLS if cell in SHORT]
)
def test_narrow_equals_onnx(
    tmp_path: Path, family: str, policy: str, flavour: Flavour, precision: str
) -> None:
    check_onnx(tmp_path, family, policy, flavour, precision)


@pytest.mark.large
@pytest.mark.parametrize(
    ("family", "policy", "flavour", "precision"), [cell for cell in CELLS if cell not in SHORT]
)
def test_narrow_equals_onnx_in_every_cell(
    tmp_path: Path, family: str, policy: str, flavour: Flavour, precision: str
) -> None:
    check_onnx(tmp_path, family, policy, flavour, precision)


def evaluated(folder: Path) -> Any:
    """Logits of `IDS` as onnx's own reference computes them: nobody's runtime."""
    graph = onnx.load(folder / "model.onnx")
    feeds: dict[str, Any] = {
        "input_ids": IDS.numpy(),
        "attention_mask": np.ones(IDS.shape, np.int64),
        "position_ids": np.broadcast_to(np.arange(IDS.shape[1]), IDS.shape),
    }
    for value in graph.graph.input:
        if value.name.startswith("past_key_values"):
            dims = value.type.tensor_type.shape.dim
            sizes = (len(IDS), dims[1].dim_value, 0, dims[3].dim_value)
            feeds[value.name] = np.zeros(sizes, np.float32)
    return ReferenceEvaluator(graph).run(["logits"], feeds)[0]


@pytest.mark.parametrize("flavour", ONNX_ALONE)
@pytest.mark.parametrize("family", [*FIRST, *NEW_FAMILIES])
def test_the_file_means_the_model_in_onnx_s_own_reference(
    tmp_path: Path, family: str, flavour: Flavour
) -> None:
    model = narrow(family, "per-layer")
    found = evaluated(export(tmp_path, model, flavour))
    expected = logits(model)
    error = (torch.from_numpy(found) - expected).abs().max()
    assert error < 1e-4 * expected.std()
