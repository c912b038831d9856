import json
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from regate_ds.recipe.run_folder import RunFolder, totals
from regate_ds.recipe.saving import one_job
from regate_ds.recipe.saving.one_job import only_job


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin("seed: 1\n")
    return folder


def test_what_a_run_left_before_its_first_checkpoint_is_forgotten_if_asked(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin("{}")
    folder.append_metrics({"step": 0})
    with pytest.raises(ValueError, match="holds a run already"):
        folder.begin("{}")
    assert not folder.resumes("auto")
    folder.begin("{}", may_hold_unsaved=True)
    assert folder.metrics() == []
    folder.checkpoints.mkdir()
    (folder.checkpoints / "latest").write_text("step-000001")
    assert [folder.resumes(asked) for asked in (False, True, "auto")] == [False, True, True]


def test_a_new_run_writes_its_configuration_and_starts_empty(folder):
    assert folder.config.read_text() == "seed: 1\n"
    assert (folder.metrics(), folder.evals()) == ([], [])


def test_rows_are_read_back_in_the_order_they_were_written(folder):
    rows = [{"step": 0, "loss": 1.5}, {"step": 1, "loss": 1.25}]
    for row in rows:
        folder.append_metrics(row)
    folder.append_eval({"step": 2})
    assert folder.metrics() == rows
    assert folder.evals() == [{"step": 2}]


def test_a_row_is_on_disk_as_soon_as_it_is_appended(folder):
    folder.append_metrics({"step": 0})
    assert json.loads((folder.path / "metrics.jsonl").read_text()) == {"step": 0}


def test_no_step_stands_twice_after_a_resume(folder):
    for step in range(5):
        folder.append_metrics({"step": step, "loss": 1.0})
    for done in (0, 2, 4):
        folder.append_eval({"step": done})
    folder.forget_after(2)
    for step in range(2, 4):
        folder.append_metrics({"step": step, "loss": 2.0})
    assert [(row["step"], row["loss"]) for row in folder.metrics()] == [
        (0, 1.0),
        (1, 1.0),
        (2, 2.0),
        (3, 2.0),
    ]
    # The evaluation right after the checkpoint is made again.
    assert [row["step"] for row in folder.evals()] == [0]


def test_half_a_line_left_by_a_killed_run_is_no_row_and_does_not_spoil_the_next(folder):
    folder.append_metrics({"step": 0})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    assert folder.metrics() == [{"step": 0}]
    folder.forget_after(1)
    folder.append_metrics({"step": 1})
    assert folder.metrics() == [{"step": 0}, {"step": 1}]


def test_a_run_that_could_be_resumed_is_not_overwritten(folder):
    folder.append_metrics({"step": 0})
    folder.checkpoints.mkdir()
    (folder.checkpoints / "latest").write_text("step_1")
    with pytest.raises(ValueError, match="set run.resume=true"):
        folder.begin("seed: 2\n")
    assert folder.metrics() == [{"step": 0}]


def test_a_run_without_a_step_is_started_anew(folder):
    folder.begin("seed: 2\n")
    assert (folder.config.read_text(), folder.metrics()) == ("seed: 2\n", [])


@pytest.mark.parametrize("result", ["summary.json", "model", "metrics.jsonl"])
def test_a_folder_that_holds_results_is_not_begun_again(folder, result):
    if result == "model":
        folder.model.mkdir()
    else:
        (folder.path / result).write_text("{}\n")
    with pytest.raises(ValueError, match=rf"already \({result}\); choose another folder, or del"):
        folder.begin("seed: 2\n")
    assert folder.config.read_text() == "seed: 1\n"


def test_a_step_has_one_evaluation_the_last(folder):
    for step, loss in ((0, 3.0), (4, 2.0), (4, 1.0)):
        folder.append_eval({"step": step, "loss": loss})
    assert folder.evals() == [{"step": 0, "loss": 3.0}, {"step": 4, "loss": 1.0}]


def test_a_summary_is_read_back(folder):
    folder.write_summary({"steps": 3, "step_seconds_sparse": None})
    assert folder.summary() == {"steps": 3, "step_seconds_sparse": None}


def test_a_run_that_is_not_finished_has_no_summary(folder):
    with pytest.raises(ValueError, match="no summary.json, so it holds no finished run"):
        folder.summary()


def test_a_broken_summary_is_named(folder):
    (folder.path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json is not JSON"):
        folder.summary()


def step(*, dense: bool, seconds: float, kept: int) -> dict:
    counts = {"tokens_total": 100, "tokens_kept": 60 + kept, "answer_total": 40}
    clock = {"step_seconds": seconds, "cpu_seconds": 2 * seconds}
    return {"dense": dense, "answer_kept": kept, **counts, **clock}


def test_totals_are_sums_over_steps_and_medians_by_kind_of_step():
    rows = [step(dense=True, seconds=s, kept=40) for s in (1.0, 2.0, 9.0)]
    rows += [step(dense=False, seconds=s, kept=20) for s in (0.5, 0.7)]
    figures = totals(rows, gated_share=0.75)
    assert figures["step_seconds_dense"] == 2.0
    assert figures["step_seconds_sparse"] == pytest.approx(0.6)
    assert figures["train_seconds"] == pytest.approx(13.2)
    assert figures["train_cpu_seconds"] == pytest.approx(26.4)
    # Three steps with all; two in which a quarter of the layers sees all, the others half.
    assert figures["answer_tokens_processed"] == 3 * 40 + 2 * (0.25 * 40 + 0.75 * 20)
    assert figures["tokens_processed"] == 3 * 100 + 2 * (0.25 * 100 + 0.75 * 80)


def test_answers_that_ran_without_a_loss_are_processed_and_those_that_had_one_alone_are_not():
    entered = [{**step(dense=False, seconds=1.0, kept=20), "answer_entered": n} for n in (40, 10)]
    figures = totals(entered, gated_share=0.75)
    assert figures["answer_tokens_processed"] == 2 * 0.25 * 40 + 0.75 * 50


def test_a_kind_of_step_that_never_ran_has_no_time():
    figures = totals([step(dense=True, seconds=1.0, kept=40)], gated_share=1.0)
    assert figures["step_seconds_sparse"] is None


@pytest.mark.parametrize(
    "line", [b'{"step": 1,, "loss": 2}', b'{"ste\xf0": 1}', b'{"stop": 1}', b"7"]
)
def test_a_damaged_line_is_named(folder, line):
    folder.append_metrics({"step": 0})
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, is damaged .*; delete that line"):
        folder.metrics()


def hold(folder: Path, ready: Connection) -> None:
    with only_job(folder, is_first=True):
        if (worker := os.fork()) == 0:
            # As a loader's worker: it has the open file, and must not keep the lock.
            signal.pause()
        ready.send((os.getpid(), worker))
        signal.pause()


def test_a_second_job_in_a_run_folder_is_told_and_a_killed_one_leaves_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(one_job, "PATIENCE", 0)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, there))
    process.start()
    holder, worker = here.recv()
    message = rf"run\.out={tmp_path} is in use by another job \(process {holder} on .*\); wait for"
    with pytest.raises(ValueError, match=message), only_job(tmp_path, is_first=True):
        pass
    assert f"is in use (process {holder} on " in capsys.readouterr().out
    with only_job(tmp_path, is_first=False):
        pass
    os.kill(holder, signal.SIGKILL)
    process.join()
    with only_job(tmp_path, is_first=True):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert not any(tmp_path.iterdir())
    os.kill(worker, signal.SIGKILL)
