"""What rounding a run's slim model costs on its test split, by precision and quantizer.

`atp-edge bench rounding --out RUN --json FILE` writes it (bench/results/rounding-cpu.json).
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from atp_export.export import export_onnx
from atp_export.runtime import Session
from atp_export.runtime import perplexity as onnx_perplexity

from atp_edge.config import Quantizer
from atp_edge.evaluation.text_loss import perplexity
from atp_edge.model.checkpoint import load_narrow
from atp_edge.model.loading import load_config
from atp_edge.model.storage import BITS, context_of
from atp_edge.run.folder import RunFolder
from atp_edge.run.progress import Progress
from atp_edge.training.setup import splits_of


def check_asked(precisions: Sequence[str], quantizers: Sequence[str]) -> None:
    """Raise ValueError for a precision that is not rounded to, or a quantizer that is none."""
    for name, asked, known in (("precision", precisions, tuple(BITS)),
                               ("quantizer", quantizers, get_args(Quantizer))):  # fmt: skip
        if not set(asked) <= set(known):
            raise ValueError(f"--{name} {', '.join(asked)}: expected {', '.join(known)}")


def bench_rounding(
    out: Path, precisions: Sequence[str], quantizers: Sequence[str], progress: Progress
) -> dict[str, Any]:
    """Each is exported, measured and thrown away; the figures go to the run's metrics as well.

    By default int4, by every quantizer. Raises ValueError for names that are not known.
    """
    check_asked(precisions, quantizers)
    run = RunFolder(out)
    config = run.config()
    run.require("slim")
    splits = splits_of(config)
    blocks, calibration = splits.test, splits.calibration
    found = []
    slim = load_config(run.slim)
    # The default is 8,192 tokens at most, and a block may have more.
    context = context_of(slim, max(context_of(slim, 0), blocks.input_ids.shape[1]))
    exact = perplexity(load_narrow(run.slim), blocks)
    pairs: Any = itertools.product(precisions or ["int4"], quantizers or get_args(Quantizer))
    for precision, quantizer in pairs:
        progress.say(f"{precision}, {quantizer}: writing, then {len(blocks.input_ids)} test blocks")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "onnx"
            written = export_onnx(
                run.slim,
                folder,
                flavour=config.export.flavour,
                precision=precision,
                quantizer=quantizer,
                calibration=calibration if quantizer == "gptq" else None,
                context=context,
            )
            rounded = onnx_perplexity(
                Session(folder), blocks.input_ids.numpy(), blocks.labels.numpy()
            )
        found.append(
            {
                "precision": precision,
                "quantizer": quantizer,
                "onnx_bytes": written.onnx_bytes,
                "onnx_perplexity": rounded,
                "ratio": rounded / exact,
            }
        )
    figures = {"fp32_perplexity": exact, "blocks": len(blocks.input_ids), "rows": found}
    run.add_metrics("rounding", figures)
    return figures
