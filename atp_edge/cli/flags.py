"""Every setting of the configuration as a flag of a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from atp_edge.settings import configured, keys, read_values


def _flag(key: Any) -> inspect.Parameter:
    """A command line flag for one setting; not given, it is what the configuration says."""
    kind = key.type
    names = [f"{key.flag}/--no-{key.flag[2:]}"] if key.type is bool else [key.flag]
    panel = key.name.partition(".")[0] if "." in key.name else "run"
    option = typer.Option(
        *names,
        help=key.help,
        show_default=str(key.default),
        rich_help_panel=panel,
    )
    return inspect.Parameter(
        key.parameter,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `--config FILE` and a flag for every setting; it receives the Config."""
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "config"
    ]
    file = inspect.Parameter(
        "config_file",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Path | None, typer.Option("--config", help="TOML configuration")],
    )

    def call(**given: Any) -> None:
        path = given.pop("config_file")
        rest = {p.name: given.pop(p.name) for p in own}
        values = {k.name: given[k.parameter] for k in keys() if given[k.parameter] is not None}
        command(configured((_values_in(path) if path else {}) | values), **rest)

    parameters = [file, *own, *map(_flag, keys())]
    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def _values_in(file: Path) -> dict[str, Any]:
    """The settings that a file names; a run's own are of the folder that it lies in, moved or
    not."""
    values = read_values(file)
    beside = any((file.parent / name).exists() for name in ("stages.json", "checkpoint"))
    if file.name == "config.toml" and beside and "out" in values:
        moved = Path(values["out"]).resolve() != file.parent.resolve()
        return values | ({"out": str(file.parent)} if moved else {})
    return values
