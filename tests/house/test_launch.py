"""The scripts in launch/, with stand-ins for Python and SLURM; tests/cluster has the real ones."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner

from regate_ds.job.arguments_file import from_file
from tests.support.paths import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))

PYTHON = f"""#!{sys.executable} -S
import os, pathlib, signal, sys, time
if sys.argv[1] == "-c":
    sys.exit(int(os.environ.get("LACKS_REGATE", "0")))
print(*(f"<{{one}}>" for one in sys.argv[1:]), sep="")
if "ENDS_AFTER_ASKING" in os.environ:
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    pathlib.Path("started").touch()
    time.sleep(60)
sys.exit(int(os.environ.get("CODE", "0")))
"""

SLURM = {
    "srun": 'while [[ $1 != bash ]]; do shift; done; SLURM_NODEID=0 "$@" & echo $! >step; wait $!',
    "scontrol": 'case "$1 $2" in "show hostnames") printf "n1\\nn2\\n" ;; '
    '"show job") echo "JobState=${STATE:-RUNNING}" ;; *) echo "scontrol $*" >>asked ;; esac',
    "scancel": 'echo "scancel $*" >>asked; kill -USR1 $(ps -o pid= --ppid "$(cat step)")',
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script of launch/ from another folder."""
    programs = {
        "python": PYTHON,
        "pdsh": "#!/bin/false\n",
        **{k: f"#!/bin/bash\n{v}\n" for k, v in SLURM.items()},
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "USER": "me"}

    def start(script, *arguments, at_start=lambda process: None, **variables):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [str(LAUNCH / script), *arguments]
        process = subprocess.Popen(command, env=environment | variables, **pipes)
        at_start(process)
        output = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, *output)

    return start


JOB = {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}


NODES = {"NNODES": "2", "MASTER_ADDR": "n1"}
NOWHERE = {"LOGS": "/dev/null/logs"}


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_the_scripts_pass_shellcheck():
    command = [str(SHELLCHECK), *map(str, SCRIPTS), "--shell=bash", str(LAUNCH / "env.example")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_scripts_can_be_started():
    assert all(os.access(path, os.X_OK) for path in SCRIPTS)


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "message"),
    [
        ("local.sh", [], {}, "usage: "),
        ("local.sh", ["two", "train"], {}, "usage: "),
        ("torchrun.sh", [], {}, "usage: "),
        ("torchrun.sh", ["trian"], {}, "usage: "),
        ("torchrun.sh", ["train"], {"RANKS": "0"}, "RANKS=0: must be a whole number above 0"),
        ("torchrun.sh", ["train"], {"NNODES": "2"}, "NNODES=2, but NODE_RANK is not set"),
        ("torchrun.sh", ["train"], {"LACKS_REGATE": "1"}, "PYTHON=python cannot import regate_ds"),
        (
            "torchrun.sh",
            ["train"],
            {"NNODES": "2", "NODE_RANK": "1"},
            "NNODES=2, but MASTER_ADDR is not set",
        ),
        ("deepspeed.sh", ["hosts"], {}, "usage: "),
        ("deepspeed.sh", ["hosts", "train"], {}, "hosts: no such hostfile"),
        ("deepspeed.sh", ["/dev/null", "train"], {}, "/dev/null: no such hostfile"),
        ("deepspeed.sh", ["empty", "train"], {}, "empty names no node; write a line 'NODE slots"),
        ("deepspeed.sh", ["bad", "train"], {}, "bad: 'n1 slots=two' is not 'NODE slots=N'"),
        ("deepspeed.sh", ["twice", "train"], {}, "twice names n1 twice"),
        ("deepspeed.sh", ["me", "train"], {}, "me names n1 twice"),
        (
            "deepspeed.sh",
            ["port", "train"],
            {},
            "'n1:2222' names a port; write 'n1', and set DS_OPT",
        ),
        (
            "deepspeed.sh",
            ["one", "train"],
            {"LOGS": "my logs"},
            "my logs: deepspeed passes it to the",
        ),
        ("deepspeed.sh", ["one", "train"], {"NODE_RANK": "1"}, "NODE_RANK=1: number the 1 nodes"),
        ("deepspeed.sh", ["one", "train"], {"NODE_RANK": "x"}, "NODE_RANK=x: number the 1 nodes"),
        ("deepspeed.sh", ["one", "train"], NOWHERE, "LOGS=/dev/null/logs: cannot be written"),
        ("torchrun.sh", ["train"], NOWHERE, "LOGS=/dev/null/logs: cannot be written"),
        ("torchrun.sh", ["train"], {"REGATE_ENV": "none.sh"}, "REGATE_ENV=none.sh: no such file"),
        ("torchrun.sh", ["train"], {"MASTER_PORT": "x"}, "MASTER_PORT=x: must be a whole number"),
        ("torchrun.sh", ["train"], {**NODES, "NODE_RANK": "2"}, "NODE_RANK=2: number the 2 nodes"),
        ("slurm.sh", ["train"], {**JOB, **NOWHERE}, "LOGS=/dev/null/logs: cannot be written"),
        ("slurm.sh", ["trian"], {}, "usage: sbatch"),
        ("slurm.sh", ["train"], {}, "not inside a SLURM job; start it by sbatch"),
        ("slurm.sh", ["train"], {**JOB, "LAUNCHER": "mpi"}, "LAUNCHER=mpi: must be torchrun"),
        ("slurm.sh", ["train"], {**JOB, "LACKS_REGATE": "1"}, "cannot import regate_ds"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run, script, arguments, variables, message):
    hostfiles = {
        "empty": "# n1 slots=8\n\n",
        "one": "n1 slots=8  # fast\n",
        "bad": "n1 slots=two\n",
        "port": "n1:2222 slots=4\n",
        "me": "me@n1 slots=1\nn1 slots=2\n",
    }
    for name, text in {**hostfiles, "twice": "n1 slots=1\nn1 slots=2\n"}.items():
        Path(name).write_text(text)
    done = run(script, *arguments, **variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


ARGUMENTS = ["train", "run.yaml", "run.deepspeed={a: {b: 1}}", "run.resume=false"]


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "slurm.sh"])
def test_arguments_and_the_exit_code_are_passed_through(run, script):
    Path("hosts").write_text("n1 slots=2\n")
    first = ["hosts"] if script == "deepspeed.sh" else []
    done = run(script, *first, *ARGUMENTS, CODE="7", NODE_RANK="0", **JOB)
    assert done.returncode == 7, done.stderr
    end = "".join(f"<{one}>" for one in ARGUMENTS)
    assert done.stdout.endswith(f"<regate_ds.cli>{end}\n")
    assert " train run.yaml run.deepspeed=" in done.stderr


HARD = ["train", "a b", "<|im_start|>user", "It costs $HOME `date` %n %h.", "'\"\\", "", "ü\n"]
"""What a shell or pdsh would change."""


def test_through_pdsh_arguments_and_variables_reach_the_nodes_as_they_are(run):
    Path("hosts").write_text("me@n1 slots=2\nn2 slots=2\n")
    variables = {
        "HF_NOTE": " a b; $HOME\n'\"\\",
        "HF_SHARE": "50%h 100%n",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "OMP_PLACES": "{0}:4",
        "NCCL_DEBUG_FILE": "/logs/%h.txt",
        "TORCH_EMPTY": "",
    }
    done = run("deepspeed.sh", "hosts", *HARD, LOGS="logs", OTHER="no", **variables)
    assert done.returncode == 0, done.stderr
    assert "<--launcher><pdsh><--master_addr><n1><" in done.stdout
    assert done.stdout.endswith(
        f"<regate_ds.cli><--arguments-file><{Path('logs').resolve()}/arguments>\n"
    )
    assert from_file(["--arguments-file", "logs/arguments"]) == HARD
    exports = exported(Path("logs/environment"))
    # pdsh replaces these.
    assert not re.search("%[hnu%]", exports)
    assert "OTHER" not in exports
    names = " ".join(f'"${name}"' for name in variables)
    shell = subprocess.run(
        ["bash", "-c", f"{exports} printf '%s\\0' {names}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert dict(zip(variables, shell.stdout.split("\0"))) == variables


def exported(file: Path) -> str:
    """What deepspeed puts before the command that a node's shell reads."""
    runner = object.__new__(PDSHRunner)
    runner.exports = {}
    for line in file.read_text().splitlines():
        runner.add_export(*line.split("=", maxsplit=1))
    return " ".join(f"export {name}={value};" for name, value in runner.exports.items())


def test_settings_come_from_the_file_in_this_folder_or_the_one_that_is_named(run):
    Path("env.sh").write_text("export RANKS=3\n")
    Path("other.sh").write_text("export RANKS=4\n")
    assert "<--nproc_per_node><3>" in run("torchrun.sh", "train").stdout
    assert "<--nproc_per_node><4>" in run("torchrun.sh", "train", REGATE_ENV="other.sh").stdout


def test_the_example_of_settings_can_be_read(run):
    done = run("torchrun.sh", "train", REGATE_ENV=str(LAUNCH / "env.example"))
    assert done.returncode == 0, done.stderr


def test_a_job_takes_address_and_port_from_slurm_and_resumes_by_itself(run):
    done = run("slurm.sh", "train", "run.yaml", RANKS="8", **JOB)
    assert "<--master_addr><n1><--master_port><10007>" in done.stdout
    assert "<--nnodes><2><--node_rank><0><--nproc_per_node><8>" in done.stdout
    assert done.stdout.endswith("<train><run.yaml><run.resume=auto>\n")
    assert "<run.resume=auto>" not in run("slurm.sh", "teacher", "run.yaml", **JOB).stdout


def test_nodes_of_a_job_are_a_hostfile_of_deepspeed(run):
    done = run("slurm.sh", "teacher", "run.yaml", LAUNCHER="deepspeed", RANKS="8", **JOB)
    assert "<--no_ssh><--node_rank><0><--master_addr><n1>" in done.stdout
    assert Path("logs/20007/hostfile").read_text() == "n1 slots=8\nn2 slots=8\n"


@pytest.mark.parametrize(
    ("code", "state", "asked"),
    [
        ("75", "RUNNING", True),
        ("143", "RUNNING", True),
        ("75", "CANCELLED", False),
        ("1", "RUNNING", False),
        ("0", "RUNNING", False),
    ],
)
def test_only_a_job_whose_ranks_were_asked_goes_back_into_the_queue(run, code, state, asked):
    done = run("slurm.sh", "train", "run.yaml", CODE=code, STATE=state, **JOB)
    assert done.returncode == int(code)
    assert Path("asked").exists() == asked


def test_a_job_that_is_asked_in_time_asks_its_ranks_and_goes_back_into_the_queue(run):
    def ask(process):
        while not Path("started").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)

    variables = {**JOB, "ENDS_AFTER_ASKING": "", "LAUNCHER": "srun"}
    done = run("slurm.sh", "train", "run.yaml", at_start=ask, **variables)
    assert done.returncode == 75, done.stderr
    assert Path("asked").read_text() == "scancel --signal=USR1 20007\nscontrol requeue 20007\n"
