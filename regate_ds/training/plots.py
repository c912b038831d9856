"""Pictures of runs: accuracy over tokens and over time, and one sample's plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402 (after the choice of a backend without a screen)
from matplotlib.axes import Axes  # noqa: E402
from PIL import Image  # noqa: E402

_AXES = (
    ("tokens_processed", "tokens processed (mean over layers)", "accuracy_over_tokens.png"),
    ("train_seconds", "training time (s)", "accuracy_over_time.png"),
)


@dataclass(frozen=True)
class TokenMark:
    """One answer token of a sample, as the plan sees it."""

    text: str
    score: float
    is_kept: bool
    is_gold: bool


def plot_accuracy(evals: Mapping[str, Sequence[Mapping[str, Any]]], out: Path) -> None:
    """Two pictures of the accuracy on words that need the image, one line for each run."""
    for key, label, name in _AXES:
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        for run, rows in evals.items():
            x = [row[key] for row in rows]
            axes.plot(x, [row["accuracy_visual"] for row in rows], marker="o", label=run)
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy, words that need the image")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(out / name, dpi=120)
        plt.close(figure)


def plot_sample(image: Image.Image, title: str, tokens: Sequence[TokenMark], path: Path) -> None:
    """The image beside its answer: colour is the score, a box is kept, a star needs the image."""
    per_line = 6
    num_lines = -(-len(tokens) // per_line)
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(12.0, max(3.2, 0.55 * num_lines + 1.4)),
        width_ratios=(1, 3),
        layout="constrained",
    )
    left.imshow(image)
    left.axis("off")
    right.axis("off")
    right.set_title(title, loc="left", fontsize=10, wrap=True)
    colours = mpl.colormaps["YlOrRd"]
    highest = max(mark.score for mark in tokens) or 1.0
    for number, mark in enumerate(tokens):
        line, column = divmod(number, per_line)
        place = (column / per_line, 1.0 - (line + 0.8) / (num_lines + 0.4))
        _draw_token(right, place, mark, colours(0.75 * mark.score / highest))
    figure.supxlabel(
        "colour: score (darker is harder)   bold box: kept   faded: elided   "
        "* only the image can tell it",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_token(axes: Axes, place: tuple[float, float], mark: TokenMark, colour: Any) -> None:
    axes.text(
        *place,
        f"{mark.text.strip() or repr(mark.text)}{' *' if mark.is_gold else ''}  {mark.score:.1f}",
        transform=axes.transAxes,
        fontsize=10,
        alpha=1.0 if mark.is_kept else 0.45,
        bbox={
            "boxstyle": "round",
            "facecolor": colour,
            "edgecolor": "black" if mark.is_kept else "none",
            "linewidth": 1.6 if mark.is_kept else 0.0,
        },
    )
