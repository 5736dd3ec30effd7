"""`bench training` and `bench kernels`: what they measure, and what they refuse to say."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from atp_bench import training
from atp_bench.kernels import attention, swiglu
from atp_bench.kernels import lora as kernels
from atp_bench.kernels.attention import AttentionCase
from atp_bench.kernels.lora import Case, bench_case, bench_kernels, error_of, make_inputs
from atp_bench.kernels.report import attention_table, kernels_table, roofline, swiglu_table
from atp_bench.kernels.swiglu import SwigluCase
from atp_bench.training import bench_training
from atp_kernels import reference
from rich.console import Console
from typer.testing import CliRunner

from atp_edge.cli.bench import bench
from atp_edge.run.files import read_json, write_json
from tests.tiny import tiny_model

CASE = Case(in_features=24, out_features=40, rank=4, tokens=16, kept=0.6, dtype="fp32")


def folder_of_a_model(path: Path) -> str:
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2}
    tiny_model("llama", **sizes).save_pretrained(path)
    return str(path)


def test_training_writes_its_ratios_and_how_they_came_about(tmp_path: Path) -> None:
    model, out = folder_of_a_model(tmp_path / "model"), tmp_path / "figures.json"
    done = CliRunner().invoke(
        bench,
        ["training", "--model", model, "--tokens", "32", "--rounds", "2", "--json", str(out)],
        catch_exceptions=False,
    )
    figures = json.loads(out.read_text())
    assert figures["gradients_equal"]
    assert 0.5 < figures["kept_share"] <= 0.6
    ours = figures["rows"]["fp32"]["kept alone"]
    assert figures["decoder_step_ratio_60"] == ours["decoder_step_ratio"] > 0
    assert figures["lora_step_ratio_60"] == ours["lora_step_ratio"] > 0
    low, high = ours["lora_step_ratio_quartiles"]
    assert low < ours["lora_step_ratio"] < high
    assert f"{low:.2f}-{high:.2f}" in done.output
    assert figures["rows"]["bf16"].keys() == figures["rows"]["fp32"].keys()
    assert figures["rows"]["fp32"]["all kept"]["lora_step_ratio"] == 1.0
    assert f"lora_step_ratio_60 = {figures['lora_step_ratio_60']:.3f}" in done.output


def test_no_ratio_where_a_gradient_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = training.gradients
    calls: list[int] = []

    def wrong(made: Any) -> dict[str, torch.Tensor]:
        calls.append(1)
        return {name: g * (1.01 if len(calls) == 1 else 1) for name, g in right(made).items()}

    monkeypatch.setattr(training, "gradients", wrong)
    folder = folder_of_a_model(tmp_path)
    figures = bench_training(folder, tokens=16, rounds=1, precisions=("fp32",))
    assert figures["decoder_step_ratio_60"] is figures["lora_step_ratio_60"] is None
    assert max(figures["largest_gradient_error"].values()) == pytest.approx(0.01, rel=1e-3)


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"kept 0, tokens 1.*expected 0 < kept <= 1"):
        bench_training("nowhere", kept=0, tokens=1)
    with pytest.raises(ValueError, match="rounds 0"):
        bench_kernels(shapes="small", tokens=(1,), ranks=(1,), kept=(1.0,), dtype="fp32",
                      rounds=0, device="cpu", compiled=False)  # fmt: skip


def test_what_was_measured_before_a_kill_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"

    def killed(said: str) -> None:
        if "1536 -> 576" in said:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench_kernels(
            shapes="small", tokens=(2,), ranks=(2,), kept=(0.5,), dtype="fp32", rounds=1,
            device="cpu", compiled=False, progress=killed,
            keep=lambda figures: write_json(file, figures),
        )  # fmt: skip
    kept = read_json(file)
    assert [case["case"]["out_features"] for case in kept["cases"]] == [576, 1536]
    assert kept["roofs"]["flops_per_s"] > 0


def test_every_rival_is_right_and_a_wrong_one_gets_no_speedup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = bench_case(CASE, rounds=1, device="cpu", compiled=False)
    for name, row in measured["rows"].items():
        assert row["speedup"] > 0, name
        assert row["error"] < 1e-5, name
    made = make_inputs(CASE, "cpu")
    assert error_of(lambda x: kernels.ours(made)(x) * 1.01, made) == pytest.approx(0.01, rel=1e-2)
    monkeypatch.setattr(kernels, "sliced", lambda made: kernels.addmm(make_inputs(
        Case(in_features=24, out_features=40, rank=4, tokens=16, kept=0.5, dtype="fp32"), "cpu"
    )))  # fmt: skip
    row = bench_case(CASE, rounds=1, device="cpu", compiled=False)["rows"]
    assert row["weights sliced beforehand"]["speedup"] is None
    assert row["ours, narrow output"]["speedup"] > 0


def test_the_narrow_path_keeps_less_for_the_backward() -> None:
    rows = bench_case(CASE, rounds=1, device="cpu", compiled=False)["rows"]
    narrow = rows["ours, narrow output"]["memory_bytes"]
    assert 0 < narrow < rows["ours, masked output"]["memory_bytes"]


SWIGLU = SwigluCase(channels=40, tokens=24, dtype="fp32")


def bench_swiglu_of(case: SwigluCase) -> dict[str, Any]:
    return swiglu.bench_swiglu(
        case, torch.float32, tolerance=1e-4, rounds=2, device="cpu", compiled=False
    )


def test_swiglu_is_right_and_an_absent_rival_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = bench_swiglu_of(SWIGLU)
    assert measured["rows"].keys() == {"torch", "ours"}
    for row in measured["rows"].values():
        assert row["error"] < 1e-5
        assert row["speedup"] > 0
    for found, reason in ((None, "not installed: pip install liger-kernel"), (1, "needs a GPU")):
        monkeypatch.setattr(swiglu.importlib.util, "find_spec", lambda name, found=found: found)
        console = Console(width=80, file=io.StringIO())
        console.print(swiglu_table(bench_swiglu_of(SWIGLU)))
        said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
        assert "Liger's SwiGLU, then the mask: " + reason.split()[0] in said


class Overwrites(torch.autograd.Function):
    """As Liger does: the gradients are written over what was given."""

    @staticmethod
    def forward(ctx: Any, e: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        ctx.given = e, u
        return torch.nn.functional.silu(e) * u

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        e, u = (t.detach() for t in ctx.given)
        de, du, _ = reference.masked_swiglu_backward(gradients[0], e, u, torch.ones(e.shape[1]))
        return e.copy_(de), u.copy_(du)


def test_liger_is_a_rival_where_it_runs_and_spoils_no_ones_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = types.ModuleType("liger_kernel.transformers.functional")
    module.liger_swiglu = Overwrites.apply  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", module)
    monkeypatch.setattr(swiglu, "liger_absent", lambda device: None)
    measured = bench_swiglu_of(SWIGLU)
    assert measured["absent"] == {}
    assert measured["rows"].keys() == {"torch", "ours", swiglu.LIGER}
    for name, row in measured["rows"].items():
        assert row["error"] < 1e-5, name
    monkeypatch.setattr(module, "liger_swiglu", lambda e, u: 1.01 * Overwrites.apply(e, u))
    rows = bench_swiglu_of(SWIGLU)["rows"]
    assert rows[swiglu.LIGER]["speedup"] is None
    assert rows["ours"]["speedup"] > 0


def test_tables_and_the_roofline_page() -> None:
    measured = bench_case(CASE, rounds=1, device="cpu", compiled=False)
    measured["rows"]["addmm"] |= {"speedup": None, "flops_per_s": None, "error": 0.5}
    console = Console(width=80, file=io.StringIO())
    console.print(kernels_table(measured))
    assert "wrong by 5e-01" in console.file.getvalue()  # type: ignore[attr-defined]
    figures = {
        "cases": [measured],
        "roofs": {"flops_per_s": 1e11, "bytes_per_s": 1e10},
        "settings": {"dtype": "fp32", "device": "cpu"},
    }
    page = roofline(figures)
    assert "ours, narrow output" in page
    assert "roof (measured)" in page


def test_attention_keeps_no_scores_and_a_wrong_rival_gets_no_speedup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = AttentionCase(heads=4, groups=2, size=8, tokens=200, dtype="fp32")

    def measured() -> dict[str, Any]:
        return attention.bench_attention(case, torch.float32, tolerance=1e-4, rounds=1)

    found = measured()
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(attention_table(found))
    assert "4 heads of 8 on 2, 200 tokens" in console.export_text()
    for name, row in found["rows"].items():
        assert row["error"] < 1e-5, name
        assert row["speedup"] > 0
    inputs_bytes = (4 + 2 + 2) * 200 * 8 * 4
    ours, eager = (found["rows"][n]["memory_bytes"] for n in ("ours", "transformers, eager"))
    assert ours <= 2 * inputs_bytes < 4 * 200 * 200 * 4 <= eager
    right = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda *a, **k: 1.01 * right(*a, **k))
    assert measured()["rows"]["ours"]["speedup"] is None
