"""A run whose budget is in bytes: what lies in onnx/ at its end is what was asked for."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer
from typer.testing import CliRunner

from atp_edge.cli import app
from atp_edge.model.checkpoint import save_narrow
from tests.atp_edge.cli.test_cli import SMALL
from tests.atp_edge.data.test_data import text
from tests.tiny import tiny_model


def test_a_run_ships_the_bytes_that_were_asked_for(tmp_path: Path, real_folder: Path) -> None:
    """Untied embeddings at int4, of operators that have no table in blocks: tokenizer included."""
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=96, intermediate_size=2048)
    save_narrow(model, tokenizer, tmp_path / "model")
    lines = [json.dumps({"text": text(i, 60)}) for i in range(60)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    asked = 10_300_000
    arguments = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"),
                 "--budget", f"bytes={asked}B", "--export-precision", "int4", "--export-flavour",
                 "standard", "--export-quantizer", "nearest", *SMALL, "--steps", "4",
                 "--recovery-reconstruct-blocks=0", "--recovery-approach-blocks=0"]  # fmt: skip
    out = ["--out", str(tmp_path / "run")]
    assert "10.3 MB" in said("run", *arguments, *out, "--dry-run")
    said("train", *arguments, *out)
    for stage in ("shrink", "export"):
        said(stage, *out)
    shipped = sum(file.stat().st_size for file in (tmp_path / "run" / "onnx").rglob("*"))
    assert 0.99 * asked <= shipped <= asked
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0.2 < metrics["shrink"]["decoder_share"] < 0.95


def said(*arguments: str) -> str:
    """What a command prints, in this process: a start of its own takes longer than what it does."""
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output
