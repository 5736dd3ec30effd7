"""The public names: what docs/api.md shows is run as it stands there, on a tiny model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import atp_edge
from atp_edge import DecisionLearner, load, narrow
from atp_edge.model.families import ATTENTION_PROJECTIONS, MLP_PROJECTIONS
from tests.sources import save_source
from tests.tiny import TRAIN_IDS, tiny_model
from tests.tiny_tokenizers import tokenizer_of

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "stored_runs" / "data.jsonl"
SETTINGS = {
    "dataset__block_tokens": 16, "dataset__test_blocks": 2, "train__precision": "no",
    "decision__width_multiple": 4, "decision__importance_blocks": 2, "lora__rank": 2,
    "recovery__reconstruct_blocks": 2, "recovery__approach_blocks": 2,
    "bench__prompt_tokens": 8, "bench__new_tokens": 4,
}  # fmt: skip


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)


def test_what_is_public_is_listed_and_there() -> None:
    from atp_edge import api

    assert atp_edge.__all__ == api.__all__ == sorted(api.__all__)
    page = (ROOT / "docs" / "api.md").read_text()
    for name in atp_edge.__all__:
        assert getattr(atp_edge, name) is getattr(api, name)
        assert f"`{name}`" in page
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        atp_edge.Trainer  # noqa: B018


def test_the_pages_python_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for settings that make it quick."""
    monkeypatch.chdir(tmp_path)
    save_source(tmp_path / "model", tokenizer=tokenizer_of("byte-level", bos=False))
    (tmp_path / "notes.jsonl").write_bytes(DATA.read_bytes())
    names: dict[str, Any] = {}
    for code in blocks("api.md"):
        quick = code.replace("steps=8", f"steps=8, **{SETTINGS!r}")
        exec(compile(quick, "docs/api.md", "exec"), names)
    assert names["folder"] == Path("runs/notes/onnx")
    metrics = json.loads(Path("runs/notes/metrics.json").read_text())
    assert metrics["export"]["precision"] == "int8"
    shown = capsys.readouterr().out
    assert metrics["verify"]["providers"]
    count, whole = re.findall(r"^(\d+) of (\d+)$", shown, re.M)[0]
    assert int(count) < int(whole)
    torch.testing.assert_close(
        narrow(load("runs/notes/dense"), names["plan"])(TRAIN_IDS[:1] % 64).logits,
        names["slim"](TRAIN_IDS[:1] % 64).logits,
    )

    shutil.copytree("runs/notes/onnx", "onnx")
    for code in blocks("deploy.md"):
        if "onnxruntime_genai" not in code or find_spec("onnxruntime_genai"):
            exec(compile(code, "docs/deploy.md", "exec"), names)
    if find_spec("onnxruntime_genai"):
        assert capsys.readouterr().out.strip()


def peft_model() -> Any:
    projections = [*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=projections, task_type="CAUSAL_LM")
    return get_peft_model(tiny_model("llama"), config)


def loss(model: nn.Module, index: int) -> Tensor:
    row = TRAIN_IDS[index % len(TRAIN_IDS)][None]
    return model(input_ids=row, labels=row).loss


def test_the_decision_is_learned_in_a_plain_loop_and_narrow_equals_masked() -> None:
    torch.manual_seed(0)
    model, accelerator = peft_model(), Accelerator(cpu=True)
    learner = DecisionLearner(
        model, [partial(loss, model, i) for i in range(2)], accelerator, width_multiple=4
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = [p.detach().clone() for p in learner.generator.parameters()]
    first = last = 0.0
    for step in range(12):
        if step % 2 == 0:
            learner.step(partial(loss, model, 8 + step))
        optimizer.zero_grad()
        task = loss(model, step % 2)
        accelerator.backward(task)
        optimizer.step()
        learner.regularize(1e-2, (step + 1) / 12)
        first, last = first or task.item(), task.item()
        assert learner.kept_share <= 0.6
    assert last < first
    moved = zip(before, learner.generator.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)
    slim = learner.narrow()
    assert not any("Masked" in type(m).__name__ for m in slim.modules())
    with torch.no_grad():
        expected = model.eval()(input_ids=TRAIN_IDS[:2]).logits
        torch.testing.assert_close(slim(input_ids=TRAIN_IDS[:2]).logits, expected,
                                   rtol=1e-4, atol=1e-4)  # fmt: skip


def test_a_decision_needs_lora_on_every_projection() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("llama"), config)
    with pytest.raises(ValueError, match="k_proj is Linear: a decision needs peft's plain LoRA"):
        DecisionLearner(model, [], Accelerator(cpu=True))
    with pytest.raises(ValueError, match="of a run alone"):
        DecisionLearner(peft_model(), [], Accelerator(cpu=True), budget="bytes=1MB")


def test_the_example_of_a_loop_is_short_and_runs(tmp_path: Path) -> None:
    example = ROOT / "examples" / "own_loop.py"
    assert len(example.read_text().splitlines()) <= 60
    save_source(tmp_path / "model", tokenizer=tokenizer_of("byte-level", bos=False))
    (tmp_path / "text.txt").write_bytes(DATA.read_bytes())
    quick = example.read_text().replace("60, 30, 128", "8, 4, 16")
    (tmp_path / "loop.py").write_text(
        quick.replace('"params=0.6"', '"params=0.6", width_multiple=4')
    )
    done = subprocess.run(
        [sys.executable, "loop.py", "model", "text.txt", "out"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    share = float(re.findall(r"frozen: (0\.\d+)", done.stdout)[0])
    assert share <= 0.6
    assert load(tmp_path / "out").num_parameters() < load(tmp_path / "model").num_parameters()
