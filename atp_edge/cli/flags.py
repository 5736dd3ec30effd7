"""Every setting of the configuration as a flag of a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any, get_args, get_type_hints

import typer

from atp_edge.config import Config
from atp_edge.gate.settings import GateSettings
from atp_edge.settings import Key, UnknownSettingError, configured, keys, read_values

SHOWN = frozenset(
    {
        "model",
        "data",
        "budget",
        "out",
        "steps",
        "recipe",
        "widths",
        "seed",
        "train.batch_blocks",
        "export.precision",
    }
)
"""The settings that most runs set; `--help-all` shows the others too."""
WIDTH = 80


def _flag(key: Key) -> inspect.Parameter:
    """A command line flag for one setting; not given, it is what the configuration says."""
    kind = key.type
    option = typer.Option(
        *_names(key),
        help=f"{_listed(key)}{key.help} ({key.default})",
        metavar="CHOICE" if get_args(key.type) else _takes(key),
        hidden=key.name not in SHOWN,
        rich_help_panel="Settings",
    )
    return inspect.Parameter(
        key.parameter,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A configuration, and the settings in it that a file or a flag named."""

    config: Config
    said: frozenset[str]


def _names(key: Key) -> list[str]:
    return [f"{key.flag}/--no-{key.flag[2:]}"] if key.type is bool else [key.flag]


def _listed(key: Key) -> str:
    choices = get_args(key.type)
    return f"{', '.join(choices)}; " if choices else ""


def _takes(key: Key) -> str | None:
    """What a flag takes: its choices, or a word for it. None: the flag is all."""
    if key.type is bool:
        return None
    return "|".join(get_args(key.type)) or {str: "TEXT", int: "N", float: "X"}[key.type]


def all_settings() -> str:
    """Every flag of every setting, its choices, its help and its default, within 80 columns."""
    lines, section = ["Every setting (its default), as a flag and by its key in a TOML file:"], ""
    for key in keys():
        begins = key.name.rpartition(".")[0] or "run"
        if begins != section:
            section = begins
            lines += ["", section]
        takes = _takes(key)
        flags = " ".join([_names(key)[0], *([takes] if takes else [])])
        lines += wrap(flags, WIDTH, initial_indent="  ", subsequent_indent=" " * 10)
        text = f"{key.help} ({key.default})"
        lines += wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _show_all(asked: bool) -> None:
    if asked:
        print(all_settings())  # noqa: T201
        raise typer.Exit


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `--config FILE` and a flag for every setting; it receives Settings."""
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "settings"
    ]
    file = inspect.Parameter(
        "config_file",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None, typer.Option("--config", metavar="FILE", help="TOML configuration")
        ],
    )
    help_all = inspect.Parameter(
        "help_all",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[
            bool,
            typer.Option(
                "--help-all",
                is_eager=True,
                callback=_show_all,
                help="all settings, these and the others",
            ),
        ],
    )

    def call(**given: Any) -> None:
        path, _ = given.pop("config_file"), given.pop("help_all")
        rest = {p.name: given.pop(p.name) for p in own}
        values = {k.name: given[k.parameter] for k in keys() if given[k.parameter] is not None}
        said = (_values_in(path) if path else {}) | values
        command(Settings(config=configured(said), said=frozenset(said)), **rest)

    parameters = [file, *own, *map(_flag, keys()), help_all]
    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def _values_in(file: Path) -> dict[str, Any]:
    """The settings that a file names; a run's own are of the folder that it lies in, moved or
    not."""
    try:
        values = read_values(file)
    except UnknownSettingError as error:
        if error.name not in {key.name for key in keys(GateSettings)}:
            raise
        raise ValueError(
            f"{file}: {error.name!r} is a setting of the gate; write the gate's settings into a "
            "file of their own, and name that with --gate-config"
        ) from None
    beside = any((file.parent / name).exists() for name in ("stages.json", "checkpoint"))
    if file.name == "config.toml" and beside and "out" in values:
        moved = Path(values["out"]).resolve() != file.parent.resolve()
        return values | ({"out": str(file.parent)} if moved else {})
    return values
