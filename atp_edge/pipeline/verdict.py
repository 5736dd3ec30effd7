"""What a run came to, said first: against the untouched model, against tuning, and what it gained.

One place computes it; the terminal, the report page and later checks read it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from atp_edge.evaluation.bootstrap import middle, resampled
from atp_edge.gate.results import judged_by
from atp_edge.pipeline.shipped_quality import rounding, shipped_perplexity

Tone = Literal["good", "unsure", "bad"]
_REASONS = 8
TONE_STYLE: dict[Tone, str] = {"good": "green", "unsure": "yellow", "bad": "red"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fact of the verdict, as a clause of a sentence, and what it means for whoever ships."""

    text: str
    tone: Tone
    advice: str = ""
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All findings so far; a stage that has not run adds none."""

    findings: tuple[Finding, ...]

    @property
    def tone(self) -> Tone:
        """The worst of the findings'."""
        order: tuple[Tone, ...] = ("bad", "unsure", "good")
        return next((t for t in order if any(f.tone == t for f in self.findings)), "unsure")

    @property
    def sentence(self) -> str:
        text = "; ".join(finding.text for finding in self.findings)
        return f"{text[0].upper()}{text[1:]}." if text else ""

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do, and before it why."""
        said = ((*finding.reasons, finding.advice) for finding in self.findings)
        return tuple(text for texts in said for text in texts if text)


def verdict_of(metrics: dict[str, Any], stale: Collection[str] = ()) -> Verdict:
    """The verdict on a run's metrics.json. stale: stages whose figures are of other files than
    there are now; with any, nothing is claimed of these."""
    if stale:
        text = f"NOT what was measured: files changed after {', '.join(stale)}"
        advice = "the same `atp-edge run` makes and measures again what no longer holds"
        return Verdict(findings=(Finding(text=text, tone="bad", advice=advice),))
    return Verdict(findings=tuple(_findings(metrics)))


def _findings(metrics: dict[str, Any]) -> Iterator[Finding]:
    if "gate" in metrics:
        yield _gate(metrics["gate"])
    if "train" in metrics:
        yield from _quality(metrics)
    if "verify" in metrics:
        yield _proof(metrics["verify"]["providers"])
    if "bench" in metrics:
        yield from _gains(metrics["bench"]["ratios"])


def _gate(gate: dict[str, Any]) -> Finding:
    """Ship or do not ship, and why."""
    counts, form = gate["counts"], gate.get("form", "onnx")
    what, of = ("it", "") if form == "onnx" else (f"{form}/", f" {form}/")
    by = judged_by(gate["profile"], gate.get("changed", ()))
    checks = sum(counts.values())
    tones: dict[str, Tone] = {"passed": "good", "undecided": "unsure", "failed": "bad"}
    said = {
        "passed": f"the gate PASSED {what} ({counts['passed']} of {checks} checks, "
        f"{counts['undecided']} undecided, {by})",
        "undecided": f"the gate is UNDECIDED{of and ' on'}{of} ({counts['undecided']} of {checks} "
        f"checks, {by}): not shown to be fit to ship",
        "failed": f"the gate says DO NOT SHIP{of} ({counts['failed']} of {checks} checks failed, "
        f"{by})",
    }
    reasons = gate["reasons"]
    more = (f"and {len(reasons) - _REASONS} more: gate.json",) * (len(reasons) > _REASONS)
    return Finding(
        text=said[gate["verdict"]],
        tone=tones[gate["verdict"]],
        reasons=(*reasons[:_REASONS], *more),
    )


def recovery_interval(metrics: dict[str, Any]) -> tuple[float, float] | None:
    """95 % interval of tuned dense over shipped perplexity, where dense and slim answered the same
    blocks; what rounding costs moves its ends."""
    losses = metrics["train"].get("block_losses", {})
    return _interval(losses.get("dense"), losses.get("slim"), rounding(metrics))


def _quality(metrics: dict[str, Any]) -> Iterator[Finding]:
    """Perplexity against the untouched and the tuned dense model, on the same test blocks."""
    train, ours = metrics["train"], shipped_perplexity(metrics)
    losses, tuned = train.get("block_losses", {}), train["dense_tuned_perplexity"]
    ends = _interval(losses.get("untuned"), losses.get("slim"), rounding(metrics))
    yield _against_untouched(ours, train["untuned_perplexity"], ends)
    kept = recovery_interval(metrics)
    sure = f" ({kept[0]:.1%} to {kept[1]:.1%})" if kept else ""
    yield Finding(
        text=f"{tuned / ours:.1%} of the tuned dense model's perplexity recovered{sure}",
        tone="good" if tuned / ours >= 0.9 else "unsure",
    )


def _against_untouched(ours: float, untouched: float, ends: tuple[float, float] | None) -> Finding:
    """ends: the 95 % interval of untouched over shipped perplexity, or None."""
    low, high = ends or (untouched / ours, untouched / ours)
    figures = f"perplexity {ours:.2f}, untouched {untouched:.2f}"
    if ends:
        figures += f", {_percent(1 / high)} to {_percent(1 / low)}"
    if low > 1:
        return Finding(
            text=f"better on its domain than the untouched model ({figures})", tone="good"
        )
    if high >= 1:
        return Finding(
            text=f"as good on its domain as the untouched model ({figures})", tone="unsure"
        )
    return Finding(
        text=f"WORSE on its domain than the untouched model ({figures})",
        tone="bad",
        advice="what ships has lost more to the cut than tuning gained: give more --steps or more "
        "text, or keep more with --budget; docs/recovery.md has the curves",
    )


def _percent(ratio: float) -> str:
    """A ratio of perplexities as a change."""
    return f"{ratio - 1:+.1%}"


def _interval(
    before: Sequence[float] | None, after: Sequence[float] | None, cost: float
) -> tuple[float, float] | None:
    """95 % interval of perplexity before over after, by blocks that both models answered.

    cost: of rounding, by which the perplexity after is larger than these losses say.
    """
    if not before or not after or len(before) != len(after):
        return None
    gained = np.array(before) - np.array(after)
    return middle(np.exp(gained[resampled(len(gained))].mean(axis=1)) / cost)


def _proof(providers: dict[str, Any]) -> Finding:
    failed = [name for name, proof in providers.items() if not proof["passed"]]
    if failed:
        return Finding(
            text=f"NOT PROVEN equal to its PyTorch model on {', '.join(failed)}",
            tone="bad",
            advice="do not ship onnx/: `atp-edge verify` says what differs",
        )
    return Finding(text="its ONNX file proven equal to its PyTorch model", tone="good")


def _gains(ratios: dict[str, float]) -> Iterator[Finding]:
    names = {
        "token_ms_p50": ("faster a token", "slower a token", "as fast a token"),
        "peak_memory_bytes": ("less memory", "more memory", "as much memory"),
        "file_bytes": ("smaller", "larger", "as large"),
    }
    for key, (more, less, same) in names.items():
        ratio = ratios[key]
        text = f"{ratio:.2f}x {more}" if ratio >= 1 else f"{1 / ratio:.2f}x {less}"
        even = round(max(ratio, 1 / ratio), 2) == 1
        tone: Tone = "unsure" if even else "good" if ratio > 1 else "bad"
        yield Finding(text=same if even else text, tone=tone)
