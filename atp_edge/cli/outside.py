"""`atp-edge generate` on a prompt outside the domain: warned of, refused, or handed over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from atp_edge.cli.wrapped import say_lines
from atp_edge.run.errors import ConditionNotMetError

if TYPE_CHECKING:  # imported where used, so that --help answers at once
    from atp_export.runtime import Generator

Outside = Literal["warn", "refuse", "ignore"]


def is_outside(generator: Generator, prompt: str, outside: Outside, fallback: Path | None) -> bool:
    """Whether the prompt lies outside the model's domain; says so, or raises
    ConditionNotMetError. Raises ValueError where that is asked for and cannot be told."""
    if generator.domain is None and (outside == "refuse" or fallback):
        raise ValueError(
            "nothing tells which domain the model was made for: domain.npz, which `atp-edge gate` "
            "writes, lies neither in its folder nor beside it; copy it there, or leave "
            "--outside refuse and --fallback out"
        )
    if generator.domain and not generator.domain.thresholds and (outside == "refuse" or fallback):
        raise ValueError(
            "domain.npz holds no threshold: the run's text has too few documents, or too short "
            "ones, to tell what lies outside of it; leave --outside refuse and --fallback out"
        )
    if generator.domain is None or (outside == "ignore" and not fallback):
        return False
    distance = generator.distance(prompt)
    if not distance.outside:
        return False
    said = (
        f"the prompt lies outside the domain that the model was made for ({distance.score:.0%} of "
        f"its token pairs are foreign to it, {distance.threshold:.0%} at most)"
    )
    if fallback:
        said += f"; {fallback} answers"
    elif outside == "refuse":
        raise ConditionNotMetError(f"{said}; give --fallback, or --outside warn")
    say_lines(Console(stderr=True, highlight=False), [said], style="yellow")
    return True


def check_another(folder: Path, fallback: Path) -> None:
    """Raise ValueError where the model that is to answer outside the domain is the slim one."""
    from atp_export.manifest import MANIFEST, read_manifest

    def weights(of: Path) -> str:
        return max(read_manifest(of).files.values(), key=lambda file: file.bytes).sha256

    listed = all((of / MANIFEST).is_file() for of in (folder, fallback))
    if folder.resolve() == fallback.resolve() or (listed and weights(folder) == weights(fallback)):
        raise ValueError(
            f"--fallback {fallback} holds the slim model itself; name one that knows more, such as "
            "the run's onnx-dense"
        )
