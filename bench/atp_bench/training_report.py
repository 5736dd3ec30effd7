"""What `atp-edge bench training` and `bench kernels` show."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def table(precision: str, rows: dict[str, Any], *, equal: bool) -> Table:
    """A row a variant; ratios only where the gradients are equal."""
    shown = Table(title=f"LoRA step, {precision}", title_justify="left")
    shown.add_column("variant", overflow="fold")
    for name in ("layers, ms", "ratio", "step, ms", "ratio"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name, row in rows.items():
        ratios = [
            f"{row[f'{step}_ratio']:.3f}" if equal else "-"
            for step in ("decoder_step", "lora_step")
        ]
        shown.add_row(name, f"{row['decoder_step_ms']:.0f}", ratios[0],
                      f"{row['lora_step_ms']:.0f}", ratios[1])  # fmt: skip
    return shown
