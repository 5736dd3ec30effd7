"""A vocabulary of 256,000: logits of every position of every prompt took 6.5 GiB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from atp_export.export import export_onnx

from atp_edge.model.checkpoint import save_narrow
from tests.tiny import tiny_model

VOCABULARY = 256_000
_VERIFY = """
import json, sys
from pathlib import Path
import torch
from atp_bench.engines.memory import peak_rss_bytes
from atp_edge.data.blocks import Blocks
from atp_edge.model.checkpoint import load_narrow
from atp_edge.pipeline.verify import rounding_cost
from atp_export.verification.verify import verify

class Numbers:
    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [int(t) if t.isdigit() else 0 for t in text.split()]}

torch.set_num_threads(1)
folder, precision = Path(sys.argv[1]), sys.argv[2]
draw = torch.Generator().manual_seed(0)
ids = torch.randint(0, int(sys.argv[3]), (8, 128), generator=draw)
prompts = [" ".join(map(str, row[:32].tolist())) for row in ids]
model = load_narrow(folder / "slim")
report = verify(folder / "onnx", model, Numbers(), prompts, new_tokens=64, precision=precision)
cost = rounding_cost(folder / "onnx", model, Blocks(input_ids=ids[:2], labels=ids[:2]), {})
print(json.dumps([report.passed, report.failures, peak_rss_bytes(), cost["ratio"]]))
"""


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_two_gigabytes_are_enough_for_a_large_vocabulary(tmp_path: Path, precision: str) -> None:
    model = tiny_model(
        "llama",
        tied=True,
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=1024,
    )
    save_narrow(model, None, tmp_path / "slim")
    export_onnx(tmp_path / "slim", tmp_path / "onnx", precision=precision)
    done = subprocess.run(
        [sys.executable, "-c", _VERIFY, str(tmp_path), precision, str(VOCABULARY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    passed, failures, peak, ratio = json.loads(done.stdout.splitlines()[-1])
    assert passed, failures
    assert peak <= 2e9
    assert 0.5 < ratio < 2
