"""How far a layer is from what this machine can do: its roofs, and the page that shows both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
import torch

from atp_bench.clock import now
from atp_bench.kernels.dtypes import TORCH, Dtype


def roofs(dtype: Dtype, device: str) -> dict[str, float]:
    """This machine's own: the best of 5 of a large product, and of a copy."""
    size = 8192 if device == "cuda" else 1536
    a = torch.randn(size, size, device=device).to(TORCH[dtype])
    buffer = torch.empty(2**28 if device == "cuda" else 2**25, dtype=torch.float32, device=device)

    def best(action: Callable[[], Any]) -> float:
        times = []
        for _ in range(6):
            began = now()
            action()
            times.append(now() - began)
        return min(times[1:])

    return {
        "flops_per_s": 2.0 * size**3 / best(lambda: a @ a),
        "bytes_per_s": 2.0 * buffer.nbytes / best(buffer.clone),
    }


def roofline(figures: dict[str, Any]) -> str:
    """One HTML page: rate against operations a byte, under this machine's two roofs."""
    figure = go.Figure()
    intensities = [measured["intensity"] for measured in figures["cases"]]
    top, slope = figures["roofs"]["flops_per_s"], figures["roofs"]["bytes_per_s"]
    low, knee, high = min([1.0, *intensities]), top / slope, 2 * max(*intensities, top / slope)
    figure.add_scatter(
        x=[low, knee, high],
        y=[low * slope, top, top],
        mode="lines",
        name="roof (measured)",
        line={"color": "#8a94a6", "dash": "dash"},
    )
    for name in figures["cases"][0]["rows"]:
        found = [m for m in figures["cases"] if m["rows"][name]["flops_per_s"] is not None]
        figure.add_scatter(
            x=[m["intensity"] for m in found],
            y=[m["rows"][name]["flops_per_s"] for m in found],
            text=["{in_features} -> {out_features}, {kept:.0%} kept".format(**m["case"])
                  for m in found],
            mode="markers", name=name,
        )  # fmt: skip
    figure.update_xaxes(type="log", title="operations a byte (kept rows)")
    figure.update_yaxes(type="log", title="useful operations a second")
    settings = figures["settings"]
    figure.update_layout(
        title=f"Masked LoRA, forward and backward, {settings['dtype']} on {settings['device']}",
        template="plotly_white",
    )
    return figure.to_html(include_plotlyjs=True)
