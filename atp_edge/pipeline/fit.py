"""Settings that fit the memory at hand, where they were not said; what does not fit is refused."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

from atp_edge.config import LORA_ALONE, Config
from atp_edge.pipeline.device import USABLE, Device
from atp_edge.pipeline.memory import needs_of
from atp_edge.pipeline.memory_need import Model, Need
from atp_edge.run.folder import RunFolder
from atp_edge.run.pinned import pinned_settings
from atp_edge.run.precision import settled
from atp_edge.run.records import STAGES, StageName
from atp_edge.settings import values_of, with_values
from atp_edge.training.frozen import check_base, check_shards

SCALE = frozenset({"lora.rank", "lora.alpha"})
"""Which go together: who says one of them has the other as it is."""

CHOSEN = (
    "train.precision",
    "train.checkpointing",
    "train.base_dtype",
    "train.moments",
    "train.shard",
    *LORA_ALONE,
    "recovery.reconstruct_blocks",
    "recovery.approach_blocks",
)
"""The settings that are chosen, where they are not said."""


def fitted(
    config: Config, model: Model, said: Collection[str], device: Device,
    left: Collection[StageName] = STAGES,
) -> tuple[Config, str | None]:  # fmt: skip
    """The settings with which a run fits a device, and a sentence if they had to be chosen.

    said: the settings that the user named; they stay. left: the stages that are to be done.
    Of the ways that follow one another, each with less memory, the first that fits is taken. Where
    none does, the settings are returned as they came: `refuse` says what is missing. `auto` is
    written down as what it means there.
    """
    config = settled(config, device.kind)
    kept = {*said} if SCALE.isdisjoint(said) else SCALE.union(said)
    wanted = partial(needs_of, model=model, device=device.kind, ranks=device.count, left=left)
    if _fits(wanted(config), device):
        return _without_auto(config), None
    for changes in _ways(config, device):
        tried = with_values(config, {k: v for k, v in changes.items() if k not in kept})
        if tried == config or not _go_together(tried):
            continue
        if _fits(wanted(tried), device):
            return _without_auto(tried), (
                f"chosen for {device.memory / 1e9:.1f} GB of {device.name}: {_shown(config, tried)}"
            )
    return config, None


def begun_settings(config: Config, said: Collection[str], run: RunFolder) -> Config:
    """The settings of a run that has begun, where they are chosen and were not said: another
    device changes nothing of it. `auto` is what the run has, as if it had not been said.
    Checkpointing, which changes the memory alone, is chosen again where weights are shared out."""
    if not run.config_toml.is_file():
        return config
    before, asked = values_of(run.config()), values_of(config)
    left = [k for k in CHOSEN if k not in said or asked[k] == "auto"]
    kept = {k: before[k] for k in left}
    if kept.get("train.shard", asked["train.shard"]) and "train.checkpointing" in kept:
        kept["train.checkpointing"] = "auto"
    return with_values(config, kept)


def _go_together(config: Config) -> bool:
    """Whether settings that were chosen go with those that were said."""
    try:
        check_base(config)
        check_shards(config)
    except ValueError:
        return False
    return True


def begun_with(config: Config, run: RunFolder) -> frozenset[str]:
    """The settings that would be chosen, were it not that the run has begun with them."""
    if not run.config_toml.is_file():
        return frozenset()
    return frozenset(CHOSEN) & pinned_settings(config).keys()


def refuse(
    config: Config,
    model: Model,
    device: Device,
    begun: Collection[str] = frozenset(),
    left: Collection[StageName] = STAGES,
) -> None:
    """Raises ValueError for a run that does not fit, with the nearest settings that do; begun:
    those that it has begun with, and that only another run can change; left: the stages that are
    to be done."""
    wanted = partial(needs_of, model=model, device=device.kind, ranks=device.count, left=left)
    found = wanted(config)
    if _fits(found, device):
        return
    short = "; ".join(short_of(need, device) for need in found if not _fits([need], device))
    if not short:
        disk = sum(need.disk_bytes for need in found)
        short = (
            f"all of it takes {disk / 1e9:.3g} GB of the {device.disk / 1e9:.3g} GB of the disk; "
            "make room there, or name another --out"
        )
    advice = "no settings known here fit: take a smaller model, or a larger device"
    for changes in _ways(config, device):
        tried = with_values(config, changes)
        if _go_together(tried) and _fits(wanted(tried), device):
            flags = " ".join(_flag(k, v) for k, v in changes.items())
            advice = f"take {flags}"
            before = values_of(config)
            if any(k in begun and before[k] != v for k, v in changes.items()):
                advice += " and a new --out: this run has begun with other settings"
            break
    raise ValueError(f"{device.name} cannot hold this run: {short}; {advice}")


def left_for_later(needs: Collection[Need], device: Device) -> str | None:
    """That a part which may wait will not be done here; None where all fits."""
    for need in (done_here(device, need) for need in needs if need.can_wait):
        if not holds(device, need):
            return f"{short_of(need, device)}: do it on a larger machine, all else is done here"
    return None


def crowded(needs: Collection[Need], device: Device) -> str | None:
    """That a part will want memory which other programs hold now; None where none does."""
    sure = [need for need in needs if not need.can_wait]
    if not sure:
        return None
    largest = max(sure, key=lambda need: _least(need, need.device_bytes))
    wanted = _least(largest, largest.device_bytes)
    if wanted <= device.free:
        return None
    return (
        f"{largest.part} takes about {wanted / 1e9:.1f} GB, and {device.free / 1e9:.1f} of the "
        f"{device.memory / 1e9:.1f} GB of {device.name} are free now: end what holds the rest"
    )


def _ways(config: Config, device: Device) -> Iterator[dict[str, Any]]:
    """Settings that take less and less, each with those before it."""
    halved = config.train.precision == "bf16"  # Weights are kept in what is computed in.
    steps: list[dict[str, Any]] = [{"train.checkpointing": "true"}]
    if device.quantizes:
        steps.append({"train.moments": "8bit"})
    if config.recovery.retrain:
        steps.append(LORA_ALONE)
    steps += [
        {"recovery.reconstruct_blocks": 0},
        *([{"train.shard": True}] if device.count > 1 else []),
        *([{"train.base_dtype": "bf16"}] if halved else []),
        {"recovery.approach_blocks": 16},
    ]
    if halved and device.quantizes and device.count == 1:
        steps.append({"train.base_dtype": "nf4"})
    changes: dict[str, Any] = {}
    for step in steps:
        changes = changes | step
        if "recovery.retrain" in changes:
            changes.pop("train.moments", None)
        yield changes


def _without_auto(config: Config) -> Config:
    """What `auto` means for memory is written down, so that a resumed run does the same."""
    if config.train.checkpointing != "auto":
        return config
    needed = "true" if config.train.shard else "false"
    return with_values(config, {"train.checkpointing": needed})


def _fits(found: list[Need], device: Device) -> bool:
    return (
        all(need.can_wait or holds(device, need) for need in found)
        and sum(need.disk_bytes for need in found) <= device.disk
    )


def holds(device: Device, need: Need) -> bool:
    """Whether its memory, or the least that is enough, is there."""
    return (
        _least(need, need.device_bytes) <= USABLE * device.memory
        and _least(need, need.host_bytes) <= USABLE * device.host
    )


def done_here(device: Device, need: Need) -> Need:
    """The part as it is done on a device: instead of itself where its memory is not there."""
    return need.instead if need.instead and not holds(device, need) else need


def _least(need: Need, asked: float) -> float:
    return min(asked, need.least or asked)


def short_of(need: Need, device: Device) -> str:
    """What a part takes that is not there, of how much, for a person."""
    if _least(need, need.device_bytes) > USABLE * device.memory:
        asked, there, what = need.device_bytes, device.memory, device.name
    elif _least(need, need.host_bytes) > USABLE * device.host:
        asked, there, what = need.host_bytes, device.host, "the host"
    else:
        asked, there, what = need.disk_bytes, device.disk, "the disk"
    return f"{need.part} takes {asked / 1e9:.1f} GB of the {there / 1e9:.1f} GB of {what}"


def _shown(before: Config, after: Config) -> str:
    old, new = values_of(before), values_of(after)
    return ", ".join(f"{k} = {_value(v)}" for k, v in new.items() if old[k] != v)


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flag(name: str, value: Any) -> str:
    flag = name.replace(".", "-").replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"
