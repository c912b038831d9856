"""`regate bench text`: the arms, a small run of each from text to table, and what is refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regate_ds.recipe.tasks.text.arms import PATCH, TEXT_ARMS
from regate_ds.recipe.tasks.text.bench import main, table_of_trials
from regate_ds.recipe.tasks.text.blocks import open_text
from regate_ds.recipe.tasks.text.trial import (
    LAST_LR,
    TextBench,
    TrialSizes,
    held_out_loss,
    lr_factor,
    run_trial,
    text_student,
)

SIZES = TrialSizes(steps=12, rows=2, hidden=32, layers=2, evaluations=3, held_out_rows=4)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    rng, path = random.Random(0), tmp_path_factory.mktemp("text") / "words"
    words = ["cat", "dog", "tree", "river", "stone", "sleeps", "runs", "falls", "and", "the"]
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(150)]
    path.write_text("\n".join(lines))
    return path


def test_arms_read_and_compute_what_their_papers_say():
    merged, superposed = TEXT_ARMS["merged"], TEXT_ARMS["superposed"]
    assert merged.config.merge.in_steps(300) == 200
    assert superposed.config.merge.in_steps(300) == 90
    assert superposed.stretch == superposed.config.merge.size == PATCH
    assert not TEXT_ARMS["dense"].config.merge.steps


def test_every_arm_runs_from_the_same_weights_and_rows(text: Path, tmp_path: Path):
    blocks = open_text(text, length=16, vocab_size=300, held_out=0.1)
    found = {}
    bench = TextBench(blocks=blocks, sizes=SIZES, folder=tmp_path)
    with pytest.raises(ValueError, match="dense-1.pt: the end of the dense run is the teacher"):
        run_trial(bench, "merged, elided", seed=1)
    for name in TEXT_ARMS:
        found[name] = run_trial(bench, name, seed=1)
    dense = 12 * 2 * 16
    assert {name: trial.tokens for name, trial in found.items()} == {
        "dense": dense,
        "dense, short": dense // 2,
        "merged": dense,
        "merged, pairs": dense,
        # 4 of 12 steps on rows four times as long.
        "superposed": 8 * 2 * 16 + 4 * 2 * 16 * 4,
        "merged, elided": dense,
    }
    for name, trial in found.items():
        steps, seconds, losses = zip(*trial.points, strict=True)
        assert steps[-1] == (6 if name == "dense, short" else 12)
        assert list(seconds) == sorted(seconds)
        assert all(0.0 < loss < 8.0 for loss in losses)
        assert ("loss_merged" in trial.jump) == (TEXT_ARMS[name].config.merge.steps > 0)
    taught = [name for name, trial in found.items() if trial.teacher_seconds > 0.0]
    assert taught == ["merged, elided"]
    assert found["merged"].points[0][2] == found["merged, elided"].points[0][2]


def test_the_held_out_loss_is_the_mean_over_tokens(text: Path):
    blocks = open_text(text, length=16, vocab_size=300, held_out=0.1)
    model = text_student(blocks, SIZES, seed=3)
    ids = blocks.held_out_NT[:4]
    wanted = float(model(input_ids=ids, labels=ids).loss)
    assert held_out_loss(model, blocks, SIZES) == pytest.approx(wanted, rel=1e-5)


def test_the_learning_rate_rises_and_falls():
    factors = [lr_factor(step, 100) for step in range(100)]
    assert factors[4] == max(factors) == 1.0
    assert factors[:5] == sorted(factors[:5])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[-1] == pytest.approx(LAST_LR, abs=1e-3)


def test_the_command_keeps_results_and_prints_the_table(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    threads = torch.get_num_threads()
    given = ["--text", str(text), "--out", str(tmp_path), "--arms", "merged", "--seeds", "1", "2"]
    given += ["--steps", "6", "--rows", "2", "--length", "16", "--vocab", "300", "--hidden", "32"]
    given += ["--layers", "2"]
    assert main(given) == 0
    table = capsys.readouterr().out.splitlines()
    rows = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("merged-*.json"))]
    assert [row["seed"] for row in rows] == [1, 2]
    assert table == table_of_trials(rows).splitlines()
    last = [row["points"][-1][2] for row in rows]
    assert f"| merged | {sum(last) / 2:.3f} ± {abs(last[0] - last[1]) / 2:.3f} |" in table[-1]
    stamps = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.json"))]
    main(given)
    assert stamps == [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.json"))]
    with pytest.raises(ValueError, match="is of other sizes: .*give another --out"):
        main([*given, "--lr", "0.1"])
    with pytest.raises(ValueError, match=r"--arms \['sparse'\]: must be of \['dense'"):
        main(["--text", str(text), "--out", str(tmp_path), "--arms", "sparse"])
    torch.set_num_threads(threads)


def test_a_text_that_a_run_would_read_twice_is_refused(text: Path, tmp_path: Path):
    blocks = open_text(text, length=16, vocab_size=300, held_out=0.1)
    bench = TextBench(blocks=blocks, sizes=replace(SIZES, steps=500), folder=tmp_path)
    with pytest.raises(ValueError, match="a run reads 1000 rows of 16 tokens, the text has"):
        run_trial(bench, "dense", seed=1)
