"""The recipe on two gloo ranks: see recipe_checks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.estimate.seen import require_same
from regate_ds.recipe.students.load import load_student
from regate_ds.stores.reference.reader import ReferenceStore
from tests.recipe.recipe_helper import (
    check_half_under_zero_3,
    check_online,
    check_recipe,
    check_resume_on_one_rank,
)
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks
from tests.support.small_corpus import make_corpus


def regate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "regate_ds.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus whose reference losses `regate teacher` has computed."""
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    done = regate("teacher", str(folder / "run.yaml"))
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_repeats_resumes_and_can_be_switched_off(corpus: Path):
    run_ranks(check_recipe, 2, str(corpus))
    run_ranks(check_half_under_zero_3, 2, str(corpus))
    run_ranks(check_resume_on_one_rank, 1, str(corpus))


def test_a_run_with_its_teacher_inside_is_the_run_with_a_store(corpus: Path):
    run_ranks(check_online, 2, str(corpus), timeout=900)


def test_train_eval_and_compare_work_from_the_command_line(corpus: Path):
    out = corpus / "alone"
    done = regate("train", str(corpus / "run.yaml"), f"run.out={out}", "run.eval_every=6")
    assert done.returncode == 0, done.stderr
    done = regate("eval", str(out))
    assert done.returncode == 0, done.stderr
    assert "accuracy_generated" in done.stdout
    done = regate("compare", str(out), "--out", str(corpus / "table"))
    assert done.returncode == 0, done.stderr
    runs = json.loads((corpus / "table" / "compare.json").read_text())["runs"]
    done = regate("estimate", str(corpus / "run.yaml"), "--gpus=1", f"--seen={out}", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    # Told from lengths alone; nothing here fills rows up to a multiple, which is not told.
    assert report["seen"]["flops"] == pytest.approx(report["seen"]["told"]["flops"])
    config = load_config(corpus / "run.yaml", [])
    with pytest.raises(ValueError, match=r"ran on 1 ranks, but --gpus is 8; give --gpus=1"):
        require_same(out, config, 8)
    other = load_config(corpus / "run.yaml", ["elision.images.keep_share=0.125"])
    with pytest.raises(ValueError, match=r"but the configuration says 0.125; give \S+config.yaml"):
        require_same(out, other, 1)
    assert runs["alone"]["tokens_processed"] > 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert runs["alone"]["flops"] == sum(row["flops"] for row in rows)
    dense, sparse = (
        sum(r["flops"] for r in rows if r["dense"] is kind)
        / sum(r["tokens_total"] for r in rows if r["dense"] is kind)
        for kind in (True, False)
    )
    assert 0 < sparse < dense
    assert (corpus / "table" / "accuracy_over_tokens.png").stat().st_size > 1000


def test_the_store_shows_its_hardest_and_easiest_words(corpus: Path):
    done = regate("store", "show", str(corpus / "run.yaml"), "--words", "4")
    assert done.returncode == 0, done.stderr
    hardest, easiest = done.stdout.strip().split("\n\n")
    means = [
        [float(line.split()[1]) for line in part.splitlines()[1:]] for part in (hardest, easiest)
    ]
    assert [len(part) for part in means] == [4, 4]
    assert means[0] == sorted(means[0], reverse=True)
    assert means[1] == sorted(means[1])
    assert means[0][-1] >= means[1][-1]


def test_a_plan_can_be_walked_without_the_weights_of_a_model(corpus: Path):
    shutil.copytree(corpus / "student", corpus / "bare")
    (corpus / "bare" / "model.safetensors").unlink()
    bare = f"model.path={corpus / 'bare'}"
    share = "{points: [[0, 0.5], [0.5, 0.25]], between: steps}"
    images = (
        f"elision.images={{keep_share: {share}, schedule: {{warmup: 0, final_dense_share: 0.5}}}}"
    )
    done = regate("train", str(corpus / "run.yaml"), "run.plan_only=true", bare, images)
    assert done.returncode == 0, done.stderr
    figures = dict(line.split() for line in done.stdout.splitlines())
    index = ReferenceStore(corpus / "store").index
    # Ten steps of four samples each: an epoch.
    kept = sum(-(-n // 2) for n in index.num_labels.tolist())
    assert figures["kept_share_of_answer"] == f"{kept / index.num_tokens:.4f}"
    assert figures["padding_share"] != "0.0000"
    assert figures["expected_share"] == f"{(2 + 2 + 8 / 2) / 12:.4f}"
    # An image of the tiny student has 16 tokens. The share jumps in the middle of the epoch here,
    # and in the run in the middle of its six sparse steps.
    assert figures["kept_share_of_image"] == f"{(5 / 2 + 5 / 4) / 10:.4f}"
    assert figures["expected_share_of_image"] == f"{(6 + 3 / 2 + 3 / 4) / 12:.4f}"


@pytest.mark.parametrize("switch", ["on", "off"])
def test_the_examples_of_the_readme_run_as_they_stand(corpus: Path, switch: str):
    root = ROOT
    command = [sys.executable, "-m", "tests.recipe.readme_example_helper"]
    done = subprocess.run(
        [*command, str(root / "README.md"), switch],
        cwd=corpus,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "steps 4 " in done.stdout
    assert (corpus / "checkpoint" / "regate" / "state.json").exists() or switch == "off"


def test_bad_records_are_left_out_and_named_if_asked_for(corpus: Path):
    records = json.loads((corpus / "data" / "train.json").read_text())
    records[3]["image"] = "images/gone.png"
    records[5]["conversations"][0]["value"] = "<image>\n" * 30 + "How many digits are there?"
    records[5]["images"] = [records[5].pop("image")] * 30
    (corpus / "data" / "damaged.json").write_text(json.dumps(records))
    damaged = f"data.train={corpus / 'data' / 'damaged.json'}"
    done = regate("train", str(corpus / "run.yaml"), damaged, "run.plan_only=true")
    assert done.returncode == 1
    assert "record 3" in done.stderr.splitlines()[-1]
    done = regate(
        "train",
        str(corpus / "run.yaml"),
        damaged,
        "run.plan_only=true",
        "data.skip_bad=true",
        "teacher.store=nowhere",
    )
    assert done.returncode == 0, done.stderr
    assert "left out 2 bad records" in done.stdout
    assert "record 5" in done.stdout


def test_a_run_of_low_rank_adapters_in_bf16_trains_and_can_be_evaluated(corpus: Path):
    out, extra = corpus / "lora", ["run.precision=bf16", "model.lora={rank: 4}"]
    done = regate("train", str(corpus / "run.yaml"), f"run.out={out}", *extra)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert regate("eval", str(out)).returncode == 0
    trained, base = (load_student(folder).model for folder in (out / "model", corpus / "student"))
    merged: Any = PeftModel.from_pretrained(base, out / "adapter").merge_and_unload()
    for name, weight in trained.state_dict().items():
        # The run adds them up in half precision.
        error = float((merged.state_dict()[name] - weight).norm())
        assert error <= 5e-3 * float(weight.norm()), (name, error)


def test_a_wrong_setting_ends_in_one_line(corpus: Path):
    """make test-faults has a table of others."""
    done = regate("train", str(corpus / "run.yaml"), "teacher.store=nowhere")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("regate train: nowhere is not a reference store")
