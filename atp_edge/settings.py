"""Settings by their dotted names: every key a flag, checked values, TOML in, TOML out."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tomli_w

from atp_edge.config import RECIPES, Config

Tree = TypeVar("Tree")
Texts = tuple[str, ...]


class UnknownSettingError(ValueError):
    """A key that no setting has; `name` is the key."""

    def __init__(self, name: str, says: str) -> None:
        super().__init__(says)
        self.name = name


@dataclass(frozen=True, kw_only=True)
class Key:
    """One setting: its dotted name, type, default, help, and the bounds of a number.

    least, most: the smallest and the largest value; above: a value that it must pass.
    """

    name: str
    type: Any
    default: Any
    help: str
    least: int = 0
    above: int | None = None
    most: int | None = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace(".", "-").replace("_", "-")

    @property
    def parameter(self) -> str:
        return self.name.replace(".", "__")


def keys(cls: type = Config, prefix: str = "") -> Iterator[Key]:
    """Every setting of the tree, depth first."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            yield from keys(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield Key(
                name=prefix + f.name,
                type=hints[f.name],
                default=f.default,
                **f.metadata,
            )


@cache
def _keys_of(cls: type) -> dict[str, Key]:
    return {key.name: key for key in keys(cls)}


def with_values(tree: Tree, values: Mapping[str, Any]) -> Tree:
    """A copy of a Config, or of another tree of settings, with dotted keys set and nothing else: a
    recipe's settings come by `configured`.

    Raises UnknownSettingError for unknown keys, before ValueError for wrong values.
    """
    kind: type = type(tree)
    known, changed = _keys_of(kind), tree
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            says = f"unknown setting {name!r}; the nearest known one is {nearest!r}"
            raise UnknownSettingError(name, says)
    for name, value in values.items():
        checked = _check(known[name], value)
        section, _, leaf = name.rpartition(".")
        if section:
            inner = replace(getattr(changed, section), **{leaf: checked})
            changed = replace(changed, **{section: inner})  # type: ignore[type-var]
        else:
            changed = replace(changed, **{leaf: checked})  # type: ignore[type-var]
    return changed


def configured(values: Mapping[str, Any]) -> Config:
    """A configuration from dotted keys alone: the defaults, the recipe's settings, these values.

    Raises ValueError for unknown keys and wrong values.
    """
    named = with_values(Config(), {"recipe": values.get("recipe", Config.recipe)})
    return with_values(named, RECIPES[named.recipe] | dict(values))


def _check(key: Key, value: Any) -> Any:
    for text in value if isinstance(value, list | tuple) else [value]:
        if isinstance(text, str) and not _is_utf8(text):
            raise ValueError(
                f"{key.name} = {text!r}: no UTF-8, and config.toml is; give it another name"
            )
    if get_origin(key.type) is Literal:
        if value not in get_args(key.type):
            raise ValueError(
                f"{key.name} = {value!r}: expected one of {', '.join(get_args(key.type))}"
            )
        return value
    if key.type == Texts:
        if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
            raise ValueError(f"{key.name} = {value!r}: expected a list of texts")
        return tuple(value)
    if key.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, key.type) or (key.type is int and isinstance(value, bool)):
        raise ValueError(f"{key.name} = {value!r}: expected {key.type.__name__}")
    if key.type in (int, float) and not _in_bounds(key, value):
        raise ValueError(f"{key.name} = {value!r}: expected {_bounds(key)}")
    return value


def _is_utf8(text: str) -> bool:
    """Whether a file of UTF-8 holds a text: the name of a file may be of other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _in_bounds(key: Key, value: float) -> bool:
    """Whether a number is finite and within the key's bounds."""
    low = value >= key.least if key.above is None else value > key.above
    return math.isfinite(value) and low and (key.most is None or value <= key.most)


def _bounds(key: Key) -> str:
    low = f"{key.least} or more" if key.above is None else f"more than {key.above}"
    return low if key.most is None else f"{low}, {key.most} at most"


def read_config(path: Path) -> Config:
    """Read a TOML file. Raises ValueError for unknown keys and wrong values."""
    return configured(read_values(path))


def read_values(path: Path, tree: object = None) -> dict[str, Any]:
    """The settings that a TOML file names, by dotted key; tree: whose they are, by default a
    Config's.

    Raises ValueError naming the file when it is no TOML, for unknown keys and for wrong values.
    """
    tables = _tables(path)
    if tree is None:  # What ran, beside a run's settings.
        tables.pop("versions", None)
    sections = {key.name.rpartition(".")[0] for key in keys(type(tree or Config()))}
    values: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, dict) and (value or name in sections):
            values |= {f"{name}.{leaf}": inner for leaf, inner in value.items()}
        else:
            values[name] = value
    try:
        with_values(tree or Config(), values)
    except UnknownSettingError as error:
        raise UnknownSettingError(error.name, f"{path}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return values


def read_versions(path: Path) -> dict[str, str]:
    """What ran, as the file says under [versions]. Raises ValueError when it is no TOML."""
    versions: dict[str, str] = _tables(path).get("versions", {})
    return versions


def _tables(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected a TOML configuration") from None
    except ValueError as error:  # of TOML or of UTF-8
        raise ValueError(f"{path} is not TOML: {error}") from None


def values_of(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key."""
    return {key.name: attrgetter(key.name)(config) for key in keys()}


def to_toml(config: Config, versions: Mapping[str, str] | None = None) -> str:
    """The whole tree as TOML, defaults included; what ran is said under [versions]."""
    tables: dict[str, Any] = {}
    for name, value in values_of(config).items():
        section, _, leaf = name.rpartition(".")
        (tables.setdefault(section, {}) if section else tables)[leaf] = value
    if versions:
        tables["versions"] = dict(versions)
    return tomli_w.dumps(tables)
