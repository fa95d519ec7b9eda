"""Pictures of a search: the losses of its trials, and what the parameters matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any


def draw_history(trials: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the validation loss of each trial and the best so far."""
    figure, axes = _figure(4.0)
    numbers = [trial["number"] for trial in trials if trial["validation_loss"] is not None]
    losses = [trial["validation_loss"] for trial in trials if trial["validation_loss"] is not None]
    axes.plot(numbers, losses, "o", color="tab:gray", label="trial")
    axes.step(numbers, list(accumulate(losses, min)), where="post", label="best so far")
    lost = [trial["number"] for trial in trials if trial["validation_loss"] is None]
    if lost:
        axes.plot(lost, [max(losses)] * len(lost), "x", color="tab:red", label="not finite")
    axes.set_xlabel("trial")
    axes.set_ylabel("validation loss, nats a token")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_importances(importances: Mapping[str, float], path: Path) -> None:
    """Draw how much each parameter matters, the greatest on top."""
    figure, axes = _figure(2.6)
    names = sorted(importances, key=lambda name: importances[name])
    bars = axes.barh(names, [importances[name] for name in names])
    axes.bar_label(bars, fmt="%.2f", padding=4)
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("importance for a low validation loss (PED-ANOVA), 1 in all")
    if not names:
        axes.text(0.5, 0.5, "too few trials", ha="center", transform=axes.transAxes)
    figure.savefig(path, dpi=120)


def _figure(height: float) -> tuple[Any, Any]:
    # Not pyplot: it would open a window where there is a screen, and keep every figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    return figure, figure.subplots()
