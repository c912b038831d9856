"""From `messages` and the folder that a model's own classes saved to a trained, evaluated run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.corpus import load_corpus
from regate_ds.recipe.reports.data import check_data
from regate_ds.recipe.students.load import load_student
from tests.support.paths import ROOT

NAMES = ("qwen2_5_vl", "internvl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    command = [sys.executable, "-W", "ignore", "-m", "tests.recipe.chat_helper", str(folder)]
    done = subprocess.run([*command, *NAMES], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return folder


def test_each_command_says_what_writes_the_samples(folder: Path):
    lines = (folder / "said.txt").read_text().splitlines()
    told = [line for line in lines if line.startswith("samples are written by")]
    assert told == [
        f"samples are written by the chat template of the model's {name}Processor"
        for name in ("Qwen2_5_VL",) * 3 + ("InternVL",) * 3
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_keeps_its_share_and_learns(folder: Path, name: str):
    run = folder / name / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["image_kept"] == rows[0]["image_total"] > 0
    for row in rows[1:3]:
        assert 0.5 <= row["image_kept"] / row["image_total"] < 0.6
    before = load_file(folder / name / "student" / "model.safetensors")
    after = load_file(run / "model" / "model.safetensors")
    assert before.keys() <= after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", NAMES)
def test_the_trained_folder_writes_the_same_samples(folder: Path, name: str):
    config = load_config(folder / name / "run.yaml", [f"model.path={folder / name}/run/model"])
    before = load_corpus(load_config(folder / name / "run.yaml"), weights=False)
    after = load_corpus(config, weights=False)
    assert after.index.fingerprint == before.index.fingerprint
    assert load_student(config.model.path, weights=False).has_chat_template  # type: ignore[arg-type]


def test_a_check_of_the_data_says_what_writes_the_samples(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert check_data(load_config(folder / "internvl" / "run.yaml"), content=False)
    told = "samples are written by the chat template of the model's InternVLProcessor"
    assert capsys.readouterr().out.splitlines()[0] == told
