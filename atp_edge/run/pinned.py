"""What a run begins with, and keeps to its end: the settings of its training, its model and text.

inputs.json holds them: `settings`, and of model, tokenizer, template and data the SHA-256 of every
file under its path in `source`, or the package that holds it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from atp_edge.config import Config
from atp_edge.run.files import read_json, write_json
from atp_edge.run.hashes import difference, value_sha256
from atp_edge.run.records import WORK, Records
from atp_edge.settings import keys, values_of

SOURCES = ("model", "tokenizer", "template", "data")
PROTECT = "protect"
"""A further source, of runs that protect a text."""
# Settings and sections that training does not read. Of model and data their files are compared.
UNREAD_BY_TRAINING = (
    "out", "recipe", "model", "data", "protect", "trust_remote_code", "export", "bench", "gate",
    "train.checkpointing", "train.shard",  # They change the memory alone.
)  # fmt: skip


def sources_in(inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of files that a run begins with."""
    return (*SOURCES, PROTECT) if PROTECT in inputs else SOURCES


def settings_of(config: Config, name: str) -> dict[str, Any]:
    """The settings that a stage reads beside those of training."""
    return {k: v for k, v in values_of(config).items() if _among(k, WORK[name].settings)}


def pinned_settings(config: Config) -> dict[str, Any]:
    """The settings that training reads: they stay as long as the run does."""
    values = values_of(config)
    pinned = {k: v for k, v in values.items() if not _among(k, UNREAD_BY_TRAINING)}
    if config.budget.startswith("bytes"):  # It counts them as they ship.
        pinned |= {k: v for k, v in values.items() if _among(k, ("export",))}
    return pinned


def _among(key: str, names: tuple[str, ...]) -> bool:
    return key in names or key.partition(".")[0] in names


def check_settings(
    folder: Path, then: Mapping[str, Any], config: Config, before: Config | None
) -> None:
    """Raise ValueError when training would read other settings than it began with.

    before: what config.toml says.
    """
    defaults = {key.name: key.default for key in keys()}
    changed = [
        (k, then.get(k, defaults[k]), v)
        for k, v in pinned_settings(config).items()
        if then.get(k, defaults[k]) != v
    ]
    if not changed:
        return
    shown = "; ".join(f"{k} = {a} there, {k} = {b} here" for k, a, b in changed[:3])
    if _among(changed[0][0], ("export",)):
        shown += ": a budget in bytes counts them as they ship"
    if before and pinned_settings(before) == pinned_settings(config):
        shown = f"inputs.json and config.toml differ: {shown}"
    raise ValueError(
        f"{folder} holds a run of another configuration ({shown}); "
        "name a new folder with --out, or repeat the old settings to go on with it"
    )


def check_names(folder: Path, before: Config, config: Config) -> None:
    """Raise ValueError when model or data are named otherwise; their files are not known."""
    for key in ("model", "data"):
        then, now = getattr(before, key), getattr(config, key)
        if then != now and os.path.realpath(then) != os.path.realpath(now):
            raise _another(folder, key, then, now)


def pin_sources(folder: Path, now: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Record what a run begins with, or raise ValueError naming the first file of model, tokenizer,
    template or data that is not what it was then."""
    then = read_inputs(folder)
    if then is None:
        _write_inputs(folder, now, say)
        return
    if (PROTECT in then) != (PROTECT in now):
        there, here = ("with" if PROTECT in x else "without" for x in (then, now))
        raise ValueError(
            f"{folder} holds a run of another configuration ({there} --protect there, {here} it "
            "here); name a new folder with --out, or repeat the old settings to go on with it"
        )
    for kind in sources_in(then):
        before, after = then[kind], now[kind]
        named = {str(Path(after["source"], k)): v for k, v in after["files"].items()}
        known = {str(Path(after["source"], k)): v for k, v in before["files"].items()}
        changed = difference(known, named)
        if changed and os.path.realpath(before["source"]) != os.path.realpath(after["source"]):
            raise _another(folder, kind, before["source"], after["source"])
        if not changed and before.get("package") != after.get("package"):
            changed = f"{before.get('package')} then, {after.get('package')} now"
        if changed:
            raise ValueError(
                f"the {kind} of {folder} is not what the run began with: {changed}; put the old "
                "one back, or start a run of the new one with another --out"
            )
    # Moved. A run that began before there was a setting has it not: its record says what it had.
    moved = {**now, "settings": then["settings"]}
    if then != moved:
        write_json(folder / "inputs.json", moved)


def _another(folder: Path, key: str, then: str, now: str) -> ValueError:
    return ValueError(
        f"{folder} holds a run of another configuration ({key} = {then} there, {key} = {now} here, "
        "with other content); name a new folder with --out, or repeat the old settings to go on "
        "with it"
    )


def read_inputs(folder: Path) -> dict[str, Any] | None:
    """What the run began with; None for one from before it was recorded.

    Raises ValueError when inputs.json is not what was written.
    """
    path, noted = folder / "inputs.json", Records(folder).inputs
    if not path.exists():
        return None
    inputs = read_json(path)
    try:
        whole = inputs_sha256(inputs) == noted or noted is None
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{path} is damaged: not what was written there, or stages.json is another run's; "
            "put back which was replaced, or delete inputs.json, and it is made again of model and "
            "data, if they are what they were"
        )
    return inputs


def _write_inputs(folder: Path, inputs: Mapping[str, Any], say: Callable[[str], None]) -> None:
    records = Records(folder)
    noted, sha256 = records.inputs, inputs_sha256(inputs)
    if noted not in (None, sha256):
        raise ValueError(
            f"{folder / 'inputs.json'} is gone, and settings, model or data are not those that the "
            "run began with; put it back, or name a new folder with --out"
        )
    if noted is None and (folder / "config.toml").exists():
        say("what model and data were was not recorded: they are taken as they are now")
    write_json(folder / "inputs.json", inputs)
    records.begin(sha256)


def inputs_sha256(inputs: Mapping[str, Any]) -> str:
    """Of what the inputs hold, wherever they lie."""
    held = {kind: inputs[kind] | {"source": ""} for kind in sources_in(inputs)}
    return value_sha256(held | {"settings": inputs["settings"]})
