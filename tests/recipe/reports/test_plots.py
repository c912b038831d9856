import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from regate_ds.recipe.reports.plots import (
    TokenMark,
    _draw_image,
    plot_accuracy,
    plot_sample,
    plot_tokens,
)

EVALS = {
    name: [
        {
            "tokens_processed": 1000.0 * i,
            "train_seconds": 2.0 * i,
            "train_cpu_seconds": 3.0 * i,
            "accuracy_visual": 0.1 * i,
        }
        for i in range(4)
    ]
    for name in ("dense", "regate")
}

BLANK = np.zeros((9, 9, 3), np.uint8)


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they were saved, by file name."""
    figures = {}
    save = mpl.figure.Figure.savefig

    def remember(figure, path, **options):
        save(figure, path, **options)
        figures[path.name] = figure

    monkeypatch.setattr(mpl.figure.Figure, "savefig", remember)
    return figures


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_accuracy_is_drawn_over_tokens_and_over_times(tmp_path, drawn):
    plot_accuracy(EVALS, tmp_path)
    keys = {"tokens": "tokens_processed", "time": "train_seconds", "cpu_time": "train_cpu_seconds"}
    for name, key in keys.items():
        (axes,) = drawn[f"accuracy_over_{name}.png"].axes
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(EVALS)
        for line, rows in zip(axes.get_lines(), EVALS.values(), strict=True):
            assert list(line.get_xdata()) == [row[key] for row in rows]
            assert list(line.get_ydata()) == [row["accuracy_visual"] for row in rows]
        assert pixels(tmp_path / f"accuracy_over_{name}.png").std() > 0


def test_an_accuracy_that_was_not_measured_is_a_gap_in_the_line(tmp_path, drawn):
    rows = [{**row, "accuracy_visual": None} for row in EVALS["dense"]]
    plot_accuracy({"blind": rows, "regate": EVALS["regate"]}, tmp_path)
    (axes,) = drawn["accuracy_over_tokens.png"].axes
    blind, measured = axes.get_lines()
    assert np.isnan(np.asarray(blind.get_ydata(), dtype=float)).all()
    assert list(measured.get_ydata()) == [row["accuracy_visual"] for row in EVALS["regate"]]


def marks(num_tokens):
    return [
        TokenMark(f"word{i}", score=i / 10, is_kept=i % 2 == 0, is_gold=i % 3 == 0)
        for i in range(num_tokens)
    ]


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 90])
def test_every_token_is_drawn_inside_the_picture_and_none_covers_another(
    num_tokens, tmp_path, drawn
):
    plot_sample(
        np.zeros((48, 48, 3), np.uint8), "<image>\nWhich?", marks(num_tokens), tmp_path / "s.png"
    )
    figure = drawn["s.png"]
    boxes = [text.get_bbox_patch().get_window_extent() for text in figure.axes[1].texts]
    assert len(boxes) == num_tokens
    assert all(figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_kept_elided_and_image_words_look_different_and_a_marker_is_not_shown(tmp_path, drawn):
    tokens = [TokenMark("$2", 1.0, True, True), TokenMark(" ", 0.0, False, False)]
    plot_sample(BLANK, "<image>\nWhich?", tokens, tmp_path / "s.png")
    left, right, _ = drawn["s.png"].axes
    assert left.get_title() == "Which?"
    gold, blank = right.texts
    assert (gold.get_text(), blank.get_text()) == (r"\$2 *", "' '")
    assert gold.get_bbox_patch().get_linewidth() > blank.get_bbox_patch().get_linewidth()
    assert gold.get_bbox_patch().get_facecolor() != blank.get_bbox_patch().get_facecolor()


def test_elided_patches_are_pale_and_kept_ones_as_they_were(tmp_path):
    kept = np.array([[True, False], [False, True]])
    image = np.full((20, 20, 3), 40, np.uint8)
    figure, axes = plt.subplots(figsize=(2, 2), dpi=50)
    axes.set_position((0, 0, 1, 1))
    _draw_image(axes, image, kept)
    axes.axis("off")
    figure.savefig(tmp_path / "s.png")
    plt.close(figure)
    seen = pixels(tmp_path / "s.png")
    quarters = [seen[y, x, 0] for y in (25, 75) for x in (25, 75)]
    assert quarters[0] == quarters[3] == 40
    assert quarters[1] == quarters[2] > 200


def test_tokens_are_drawn_by_kind_and_add_up(tmp_path, drawn):
    image, answer, everything = 60.0, 25.0, 100.0
    row = {
        "image_tokens_processed": image,
        "answer_tokens_processed": answer,
        "tokens_processed": everything,
    }
    plot_tokens({"dense": row, "regate": {key: value / 2 for key, value in row.items()}}, tmp_path)
    (axes,) = drawn["tokens_by_kind.png"].axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [image, image / 2, answer, answer / 2, 15.0, 7.5]
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches[-2:]]
    assert ends == [everything, everything / 2]


def test_scores_of_zero_can_be_drawn(tmp_path):
    plot_sample(BLANK, "", [TokenMark("a", 0.0, True, False)], tmp_path / "s.png")
    assert (tmp_path / "s.png").is_file()


def test_no_figure_stays_open(tmp_path):
    plot_accuracy(EVALS, tmp_path)
    assert plt.get_fignums() == []
