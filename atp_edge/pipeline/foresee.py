"""What a run will take, and with which settings: found, and refused, before any of its work."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from atp_edge.config import Config
from atp_edge.pipeline.cost_estimate import sized_model
from atp_edge.pipeline.device import Device, device_of
from atp_edge.pipeline.export_gguf import wants_uniform
from atp_edge.pipeline.fit import (
    begun_settings,
    begun_with,
    crowded,
    fitted,
    left_for_later,
    refuse,
)
from atp_edge.pipeline.launch import check_ranks
from atp_edge.pipeline.memory import needs_of
from atp_edge.pipeline.memory_need import Model, Need
from atp_edge.pipeline.preflight import check_run
from atp_edge.pipeline.stages import done_by
from atp_edge.run.folder import RunFolder
from atp_edge.run.precision import settled, what_is_slow
from atp_edge.run.records import StageName


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """A run whose settings are fit for it; `refuse` says whether the device is."""

    config: Config
    """To run with."""
    chosen: str | None
    """What of it was chosen to fit, in words."""
    names: Sequence[StageName]
    model: Model
    device: Device
    begun: frozenset[str]
    left: frozenset[StageName]
    """Of the named stages those that are not done."""
    needs: list[Need]
    """Of what is left to do."""

    def refuse(self) -> None:
        """Raises ValueError where the device cannot hold the run."""
        refuse(self.config, self.model, self.device, self.begun, self.left)

    def warnings(self) -> list[str]:
        """What will be slow, left for later, out of reach of llama.cpp, or short of memory that
        others hold now."""
        trains = "train" in self.left
        found = (
            what_is_slow(self.config, self.device.kind) if trains else None,
            wants_uniform(self.config) if trains else None,
            left_for_later(self.needs, self.device) if "gate" in self.names else None,
            crowded(self.needs, self.device),
        )
        return [warning for warning in found if warning]


def foresee(
    config: Config,
    said: Collection[str],
    names: Sequence[StageName],
    *,
    device_memory: str | None = None,
    weights: bool = True,
) -> Foreseen:
    """These stages of a run, on the device at hand or on a GPU of `device_memory`.

    said: the settings that stay as they are; those of fit.CHOSEN that are not among them are chosen
    to fit. weights: as `check_run` has it. Raises what `check_run` does.
    """
    run = RunFolder(Path(config.out))
    device = device_of(device_memory, run.path)
    config = begun_settings(config, said, run)
    check_ranks(config, device.count)
    check_run(config, names, weights=weights, elsewhere=device_memory is not None)
    model, begun = sized_model(config), begun_with(config, run)
    left, chosen = _left(config, run, names), None
    if "train" in left:
        config, chosen = fitted(config, model, {*said, *begun}, device, left)
    needs = needs_of(config, model, device.kind, device.count, left)
    return Foreseen(
        config=config, chosen=chosen, names=names, model=model, device=device, begun=begun,
        left=left, needs=needs,
    )  # fmt: skip


def _left(config: Config, run: RunFolder, names: Sequence[StageName]) -> frozenset[StageName]:
    """The stages that are to be done (again), with the settings that they would be done with."""
    from atp_edge.pipeline.inputs import anchored

    records, asked = run.records, settled(anchored(config))
    done = [n for n in names if records.get(n) and not records.trouble(n, done_by(asked, n))]
    return frozenset(names) - frozenset(done)
