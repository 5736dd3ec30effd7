"""`atp-edge push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

console = Console(highlight=False, emoji=False)
Form = Literal["slim", "onnx", "adapter"]


def push(
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="a repository of the Hub")],
    out: Annotated[Path, typer.Option("--out", help="the run's folder")],
    form: Annotated[Form, typer.Option(metavar="FORM", help="onnx, slim or adapter")] = "onnx",
    public: Annotated[bool, typer.Option(help="a new repository is public")] = False,
) -> None:
    """Upload what a run ships, with its card, to the Hugging Face Hub."""
    from atp_edge.pipeline.push import push as upload
    from atp_edge.run.folder import RunFolder

    address = upload(RunFolder(out), name, form, public=public)
    console.print(Text(f"pushed: {address}"), soft_wrap=True)
