"""Draw pictures of runs: accuracy over tokens and over time, tokens by kind, one sample's plan."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402 (after the choice of a backend without a screen)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.cm import ScalarMappable  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap, Normalize  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402
from matplotlib.ticker import EngFormatter  # noqa: E402

from regate_ds.data.llava.records import MARKER

_AXES = (
    ("tokens_processed", "tokens processed (mean over layers)", "accuracy_over_tokens.png"),
    ("train_seconds", "training time (s)", "accuracy_over_time.png"),
    ("train_cpu_seconds", "training CPU time of all ranks (s)", "accuracy_over_cpu_time.png"),
)


_DPI = 120
_PER_LINE = 8
_STAR = " *"
_COLOURS = LinearSegmentedColormap.from_list("score", ("#ffffe5", "#fec44f", "#ec7014"))
"""Colours that are light enough, even at the highest score, for black text on them."""


@dataclass(frozen=True)
class TokenMark:
    """One answer token of a sample, as the plan sees it."""

    text: str
    score: float
    is_kept: bool
    is_gold: bool


def plot_accuracy(evals: Mapping[str, Sequence[Mapping[str, Any]]], out: Path) -> None:
    """Draw the accuracy on words that need the image, over tokens and times, a line per run."""
    for key, label, name in _AXES:
        figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=_DPI, layout="constrained")
        for run, rows in evals.items():
            x = [row.get(key) for row in rows]
            axes.plot(x, [row["accuracy_visual"] for row in rows], marker="o", label=run)
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy on words that need the image")
        if key == "tokens_processed":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(out / name)
        plt.close(figure)


def plot_tokens(summaries: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Draw for each run how many tokens of each kind were processed, as one bar."""
    names = list(summaries)
    image, answer, everything = (
        [summary.get(key) or 0 for summary in summaries.values()]
        for key in ("image_tokens_processed", "answer_tokens_processed", "tokens_processed")
    )
    other = [a - b - c for a, b, c in zip(everything, image, answer, strict=True)]
    figure, axes = plt.subplots(figsize=(6.4, 1.2 + 0.5 * len(names)), dpi=_DPI)
    figure.set_layout_engine("constrained")
    start = [0.0] * len(names)
    for kind, counts in (("image", image), ("answer", answer), ("prompt", other)):
        axes.barh(names, counts, left=start, label=kind)
        start = [a + b for a, b in zip(start, counts, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("tokens processed (mean over layers)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out / "tokens_by_kind.png")
    plt.close(figure)


def plot_sample(
    image: np.ndarray,
    question: str,
    tokens: Sequence[TokenMark],
    path: Path,
    kept_patches: np.ndarray | None = None,
) -> None:
    """Draw the image beside the answer's tokens in reading order, coloured by score.

    image: [height, width, 3], values from 0 to 1 or of uint8.
    kept_patches: bool [rows, columns] of image tokens; the elided ones are drawn pale.

    A kept token has a black frame, an elided one a pale dotted frame. A star marks a token that
    needs the image.
    """
    num_lines = -(-len(tokens) // _PER_LINE)
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(12.0, max(3.6, 0.42 * num_lines + 1.9)),
        dpi=_DPI,
        width_ratios=(1, 3.4),
        layout="constrained",
    )
    _draw_image(left, image, kept_patches)
    left.set_title(textwrap.fill(MARKER.sub("", question).strip(), 34), fontsize=9)
    scale = ScalarMappable(Normalize(0.0, max(mark.score for mark in tokens) or 1.0), _COLOURS)
    for number, mark in enumerate(tokens):
        line, column = divmod(number, _PER_LINE)
        place = ((column + 0.5) / _PER_LINE, 1.0 - (line + 0.5) / num_lines)
        _draw_token(right, place, mark, scale.to_rgba(mark.score))
    for axes in (left, right):
        axes.axis("off")
    figure.colorbar(scale, ax=right, label="score (nats)", fraction=0.03, pad=0.02)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def _draw_image(axes: Axes, image: np.ndarray, kept_patches: np.ndarray | None) -> None:
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0))
    if kept_patches is None or kept_patches.all():
        return
    veil = np.ones((*kept_patches.shape, 4))
    veil[..., 3] = np.where(kept_patches, 0.0, 0.8)
    axes.imshow(veil, extent=(0, width, height, 0), interpolation="nearest")


def _draw_token(axes: Axes, place: tuple[float, float], mark: TokenMark, colour: Any) -> None:
    text = mark.text.strip() or repr(mark.text)
    axes.text(
        *place,
        # A dollar sign would start a formula.
        (text + _STAR * mark.is_gold).replace("$", r"\$"),
        transform=axes.transAxes,
        ha="center",
        va="center",
        fontsize=10,
        fontweight="bold" if mark.is_gold else "normal",
        color="black" if mark.is_kept else "0.3",
        bbox={
            "boxstyle": "round,pad=0.35",
            "facecolor": colour,
            "edgecolor": "black" if mark.is_kept else "0.8",
            "linewidth": 1.6 if mark.is_kept else 0.5,
            "linestyle": "solid" if mark.is_kept else "dotted",
        },
    )


def _legend() -> list[Any]:
    white = {"facecolor": "white"}
    return [
        Patch(edgecolor="black", linewidth=1.6, label="kept", **white),
        Patch(edgecolor="0.6", linewidth=0.8, linestyle="dotted", label="elided", **white),
        Line2D([], [], marker="*", color="black", linestyle="none", label="needs the image"),
    ]
