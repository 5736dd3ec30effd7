"""What a command line gives: no option without its value, as an unset variable of a script has;
and what a shell may complete a value to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from typer.core import TyperGroup, TyperOption


class Commands(TyperGroup):
    """Commands, none of whose options takes an empty text. Raises ValueError naming the option."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """One of them."""
        command = super().get_command(ctx, cmd_name)
        for option in command.params if command else ():
            if isinstance(option, TyperOption):
                heard = option.process_value
                option.process_value = partial(_given, option, heard)  # type: ignore[method-assign]
        return command


def one_of(*values: str) -> Callable[[str], list[str]]:
    """A shell's completion of an option that takes one of these."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def _given(option: TyperOption, heard: Any, ctx: Any, value: Any) -> Any:
    """The value as it is read otherwise. heard: how."""
    texts = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(text, str) and not text.strip() for text in texts):
        raise ValueError(f"{option.opts[-1]} is empty; give it a value, or leave it out")
    return heard(ctx, value)
