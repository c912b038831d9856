import json
import subprocess
import sys

import pytest

from regate_ds import cli
from regate_ds.job.preemption import EXIT_CODE, Preempted
from regate_ds.recipe import teacher_job, trainer
from regate_ds.recipe.bench import step as bench
from regate_ds.recipe.doctor import examine as doctor
from regate_ds.recipe.evaluation import finished_run
from regate_ds.recipe.reports import compare
from regate_ds.recipe.tasks.digits import scenes as digits

COMMANDS = [
    "data",
    "teacher",
    "store",
    "train",
    "pretrain",
    "eval",
    "compare",
    "bench",
    "estimate",
    "doctor",
]

CONFIG = """
model: {path: student}
data: {train: train.json}
teacher: {store: reference}
run: {out: runs/one}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS), ["data", "digits"]], ids=str)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert " ".join(["usage: regate", *command]) in capsys.readouterr().out


def test_help_loads_no_framework():
    code = (
        "import sys; from regate_ds import cli; cli._parser().format_help(); "
        "print([m for m in ('torch', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_module_can_be_started_as_a_launcher_does(tmp_path):
    command = [sys.executable, "-m", "regate_ds.cli", "--local_rank=1", "eval", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert str(tmp_path) in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "launcher", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"]], ids=" ".join
)
def test_training_gets_the_overrides_and_not_what_the_launcher_adds(launcher, config, monkeypatch):
    seen = []
    monkeypatch.setattr(trainer, "train", lambda config: seen.append(config) or {})
    assert cli.main([*launcher, "train", str(config), "run.steps=7", "optimizer.lr=1e-3"]) == 0
    assert (seen[0].run.steps, seen[0].optimizer.lr) == (7, 1e-3)


def test_the_teacher_gets_the_configuration(config, monkeypatch):
    seen = []
    monkeypatch.setattr(teacher_job, "run_teacher", seen.append)
    assert cli.main(["teacher", str(config), "teacher.tokens_per_batch=64"]) == 0
    assert seen[0].teacher.tokens_per_batch == 64


def test_evaluation_gets_the_run_folder(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(finished_run, "evaluate_run", lambda folder: seen.append(folder) or {})
    assert cli.main(["eval", str(tmp_path)]) == 0
    assert seen == [tmp_path]


def test_the_data_command_passes_its_sizes_on(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(digits, "build_digits", lambda out, **sizes: seen.append((out, sizes)))
    sizes = ["--train", "3", "--test", "2", "--seed", "1", "--frames", "4"]
    assert cli.main(["data", "digits", str(tmp_path), *sizes]) == 0
    assert seen == [(tmp_path, {"num_train": 3, "num_test": 2, "seed": 1, "num_frames": 4})]


def test_comparing_prints_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "compare_runs", lambda folders, out: f"{len(folders)} runs, {out}")
    assert cli.main(["compare", str(tmp_path), str(tmp_path), "--out", "there"]) == 0
    assert capsys.readouterr().out == "2 runs, there\n"


def test_the_benchmark_reads_its_own_arguments(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "main", seen.append)
    assert cli.main(["bench", "step", "--json", "f", "tokens=3"]) == 0
    assert seen == [["--json", "f", "tokens=3"]]


def test_an_error_is_one_line_and_exit_code_1(config, capsys):
    assert cli.main(["train", str(config), "elision.keep_shar=0.5"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "elision.keep_shar=0.5" in output.err
    assert "did you mean elision.keep_share?" in output.err


def test_an_error_of_several_lines_is_put_on_one(config, monkeypatch, capsys):
    def fail(_):
        raise RuntimeError("first\n  second")

    monkeypatch.setattr(trainer, "train", fail)
    assert cli.main(["train", str(config)]) == 1
    assert capsys.readouterr().err == "regate train: first second\n"


@pytest.mark.parametrize(("text", "line"), [("saved", "regate train: saved\n"), ("", "")])
def test_a_run_that_was_asked_to_end_has_an_exit_code_of_its_own(
    text, line, config, monkeypatch, capsys
):
    def stop(_):
        raise Preempted(text)

    monkeypatch.setattr(trainer, "train", stop)
    assert cli.main(["train", str(config)]) == EXIT_CODE == 75
    assert capsys.readouterr().err == line


def test_a_missing_file_is_named(tmp_path, capsys):
    assert cli.main(["train", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml" in capsys.readouterr().err


def test_debug_shows_where_an_error_came_from(config):
    with pytest.raises(ValueError, match="keep_shar"):
        cli.main(["train", str(config), "elision.keep_shar=0.5", "--debug"])


def test_our_own_bugs_are_not_hidden(config, monkeypatch):
    def fail(_):
        raise AssertionError("a bug")

    monkeypatch.setattr(trainer, "train", fail)
    with pytest.raises(AssertionError):
        cli.main(["train", str(config)])


@pytest.mark.parametrize(
    "wrong", [[], ["trian"], ["train"], ["train", "c.yaml", "--fast"], ["compare"]], ids=str
)
def test_wrong_usage_is_exit_code_2(wrong):
    with pytest.raises(SystemExit) as stop:
        cli.main(wrong)
    assert stop.value.code == 2


@pytest.mark.parametrize(("lacks", "code"), [(False, 0), (True, 1)])
def test_the_doctor_fails_only_if_something_required_is_missing(lacks, code, monkeypatch, capsys):
    check = doctor.Check("torch", "missing", is_required=lacks, is_fine=False)
    monkeypatch.setattr(doctor, "examine", lambda _: [check])
    assert cli.main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out)[0]["name"] == "torch"


@pytest.mark.parametrize("content", [None, b"", b"train\0run.y"])
def test_a_file_of_arguments_that_this_node_does_not_see_whole_is_an_error_in_one_line(
    tmp_path, capsys, content
):
    path = tmp_path / "arguments"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["--arguments-file", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"regate --arguments-file: {path} ")
    assert line.endswith("set LOGS to a folder that all nodes share")
