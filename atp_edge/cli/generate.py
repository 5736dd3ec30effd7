"""`atp-edge generate`."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from atp_edge.cli.outside import Outside, check_another, is_outside

console = Console(highlight=False, emoji=False)


def generate(
    prompt: Annotated[str, typer.Argument(help="text to go on from")],
    out: Annotated[Path, typer.Option("--out", help="the run's folder")],
    max_new_tokens: Annotated[int, typer.Option(help="tokens at most")] = 96,
    temperature: Annotated[float, typer.Option(help="0: greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="nucleus")] = 1.0,
    top_k: Annotated[int, typer.Option(help="the likeliest so many; 0: all")] = 0,
    seed: Annotated[int, typer.Option(help="of the draw")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text")] = None,
    adapter: Annotated[Path | None, typer.Option(help="a .onnx_adapter of the model")] = None,
    chat: Annotated[bool, typer.Option(help="through the chat template")] = False,
    check: Annotated[bool, typer.Option(help="read every shipped file first")] = False,
    outside: Annotated[
        Outside, typer.Option(help="of a prompt outside the model's domain")
    ] = "warn",
    fallback: Annotated[
        Path | None, typer.Option(help="an exported folder that takes prompts outside the domain")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="run code that the tokenizer's folder brings")
    ] = False,
) -> None:
    """Talk to the slim ONNX model."""
    from atp_export.runtime import Generator, Sampling

    from atp_edge.data.chat import chat_ids

    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    folder = _checked(out, fallback, every_byte=check)
    generator = Generator(folder, adapter=adapter, trust_remote_code=trust_remote_code)
    if is_outside(generator, prompt, outside, fallback) and fallback:
        generator = Generator(fallback, trust_remote_code=trust_remote_code)
    asked: str | list[int] = chat_ids(generator.tokenizer, prompt) if chat else prompt
    pieces = iter(
        generator.stream(asked, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop or ())
    )
    first = next(pieces, "")  # What is refused is refused here, and no prompt stands before it.
    if not chat:
        console.print(prompt, end="", markup=False, style="dim", soft_wrap=True)
    silent = True
    for piece in chain([first], pieces):
        silent = silent and not piece
        console.print(piece, end="", markup=False, soft_wrap=True)
    console.print()
    if silent and not stop:
        console.print("(no text: every new token is a special one)", style="dim")


def _checked(out: Path, fallback: Path | None, *, every_byte: bool) -> Path:
    """The folder of the ONNX model, of a run or exported. Raises ValueError where it or the
    fallback is not what was shipped: by sizes, or by every byte."""
    from atp_export.manifest import MANIFEST, check_sizes, verify_manifest
    from atp_export.other_layouts import no_model_in

    from atp_edge.run.folder import RunFolder

    if fallback and not (fallback / "model.onnx").is_file():  # which most prompts never ask for
        raise ValueError(f"--fallback: {no_model_in(fallback)}")
    run = RunFolder(out)
    if run.config_toml.exists():
        run.require("onnx")
        run.require_profile()
    # An exported folder has a manifest; transformers.js's has an onnx/ in it.
    exported = (out / MANIFEST).is_file() or not run.onnx.is_dir()
    onnx = out if exported else run.onnx
    for folder in filter(None, (onnx, fallback)):
        if every_byte:
            verify_manifest(folder)
        elif (folder / MANIFEST).exists():
            check_sizes(folder)
    if fallback:
        check_another(onnx, fallback)
    return onnx
