"""What launchers announce is found as it is; what is missing or contradicts itself is told."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from regate_ds.job.arguments_file import read_arguments
from regate_ds.job.ranks import Ranks, discover, first_host, job_port
from tests.support.paths import ROOT

names = st.from_regex(r"[a-z][a-z0-9-]{0,6}", fullmatch=True)


@st.composite
def jobs(draw: Any) -> tuple[dict[str, str], Ranks]:
    """Draw a rank of a job: what its launcher announces, and where it is."""
    num_tasks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    node = draw(st.integers(0, len(num_tasks) - 1))
    local = draw(st.integers(0, num_tasks[node] - 1))
    rank, size = sum(num_tasks[:node]) + local, sum(num_tasks)
    assume(size > 1)
    launcher = draw(st.sampled_from(sorted(LAUNCHERS)))
    address, port = draw(names), draw(st.integers(1, 65535))
    group = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    ranks = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local}
    nodes = {
        "torchrun": ("GROUP_RANK", "GROUP_WORLD_SIZE"),
        "deepspeed": ("CROSS_RANK", "CROSS_SIZE"),
    }
    if launcher in nodes:
        number, count = nodes[launcher]
        own = {**ranks, number: node, count: len(num_tasks)}
        found = Ranks(launcher, rank, size, local, str(node), address, port)
    else:
        index, count, local_name = LAUNCHERS[launcher]
        own = {index: rank, count: size, local_name: local, "SLURMD_NODENAME": f"n{node}"}
        found = Ranks(launcher, rank, size, local, f"n{node}", address, port)
        if launcher == "srun":
            own |= {"SLURM_STEP_NODELIST": "n[0-3]", "SLURM_NTASKS": size}
    return {name: str(value) for name, value in own.items()} | group, found


LAUNCHERS = {
    "torchrun": (),
    "deepspeed": (),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "jsrun": ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "flux run": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
}
"""The names of a task's number, of the number of tasks, and of its number on its node."""


def found_in(environment: dict[str, str]) -> Ranks | str:
    """Return what is found, or the line that is said against it."""
    try:
        return discover(environment)
    except ValueError as error:
        (line,) = str(error).splitlines()
        return line


@given(jobs())
def test_a_rank_is_found_where_its_launcher_put_it(job: tuple[dict[str, str], Ranks]):
    environment, expected = job
    assert found_in(environment) == expected


@given(job=jobs(), data=st.data())
def test_a_rank_whose_variables_were_dropped_is_never_taken_for_a_job_of_its_own(
    job: tuple[dict[str, str], Ranks], data: st.DataObject
):
    """As by a container, by sudo or by ssh: whatever is left of them says enough, or is refused."""
    environment, expected = job
    kept = data.draw(st.sets(st.sampled_from(sorted(environment))))
    found = found_in({name: value for name, value in environment.items() if name in kept})
    if isinstance(found, Ranks) and found.world_size == 1:
        # Nothing is left of what says that there are others, but their address.
        tells = {environment[name] for name in kept if name not in SAYS_NOTHING}
        assert tells <= {"0", "1"}
    elif isinstance(found, Ranks):
        assert (found.rank, found.world_size) == (expected.rank, expected.world_size)


SAYS_NOTHING = {"MASTER_ADDR", "MASTER_PORT", "SLURMD_NODENAME", "SLURM_STEP_NODELIST"}

HARD = ["", "0", "1", "-1", "7", "1.5", "x", " 2", "9" * 30, "²", "node[1-3]", "a,b", "[", "\n"]


@given(job=jobs(), data=st.data())
def test_whatever_variables_hold_it_is_a_rank_or_one_line(
    job: tuple[dict[str, str], Ranks], data: st.DataObject
):
    environment, _ = job
    more = ["SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_PROCID", "PMI_RANK", "RANK", "WORLD_SIZE"]
    changed = st.sampled_from([*environment, *more])
    changes = st.dictionaries(changed, st.sampled_from(HARD) | st.text(max_size=3), min_size=1)
    found = found_in(environment | data.draw(changes))
    if isinstance(found, Ranks):
        assert 0 <= found.rank < found.world_size
        assert found.local_rank >= 0
        assert found.port is None or 0 < found.port < 65536


@given(st.integers(0, 2**63))
def test_the_port_of_a_job_can_be_listened_on(job: int):
    assert 1024 <= job_port(job) < 32768


@st.composite
def node_lists(draw: Any) -> tuple[str, str]:
    """Draw a list of nodes as SLURM writes it, and its first node."""
    written, first = [], []
    for _ in range(draw(st.integers(1, 3))):
        parts, own = [draw(names)], []
        own.append(parts[0])
        for _ in range(draw(st.integers(0, 2))):
            width = draw(st.integers(1, 3))
            number = f"{draw(st.integers(0, 9)):0{width}}"
            ranges = [f"{number}-{int(number) + 3:0{width}}", number, f"{number},{number}5"]
            end = draw(st.sampled_from(["", "-ib", "x"]))
            parts.append(f"[{draw(st.sampled_from(ranges))}]{end}")
            own.append(f"{number}{end}")
        written.append("".join(parts))
        first.append("".join(own))
    return ",".join(written), first[0]


@given(node_lists())
def test_the_first_node_of_a_list_is_its_first(drawn: tuple[str, str]):
    assert first_host(drawn[0]) == drawn[1]


@given(st.lists(st.binary(max_size=6).map(lambda text: text.replace(b"\0", b"")), min_size=1))
def test_arguments_of_a_file_are_those_that_were_written(arguments: list[bytes]):
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"arguments-{os.getpid()}"
    path.write_bytes(b"".join(one + b"\0" for one in arguments))
    assert [os.fsencode(one) for one in read_arguments(path)] == arguments
    path.unlink()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    python = '#!/bin/sh\n[ "$1" = -c ] || printf "<%s>" "$@"\n'
    (folder / "python").write_text(python)
    (folder / "python").chmod(0o755)
    return folder


def launched(folder: Path, hostfile: str, node_rank: int) -> subprocess.CompletedProcess[str]:
    (folder / "hosts").write_text(hostfile)
    command = [str(ROOT / "launch/deepspeed.sh"), "hosts", "train", "run.yaml"]
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "NODE_RANK": str(node_rank),
        "LOGS": "logs",
    }
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


spaces = st.sampled_from([" ", "  ", "\t"])
nothing = st.sampled_from(["", "  ", "\t"])
comments = st.sampled_from(["", "# n9 slots=2", "#"])


@st.composite
def hostfiles(draw: Any) -> tuple[list[str], list[str]]:
    """Draw a hostfile's lines, and the nodes that it names."""
    nodes = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    lines = []
    for node in nodes:
        user, slots = draw(st.sampled_from(["", "me@"])), draw(st.integers(1, 64))
        line = f"{draw(nothing)}{user}{node}{draw(spaces)}slots={slots}{draw(nothing)}"
        lines += [draw(nothing) + draw(comments)] * draw(st.integers(0, 1))
        lines.append(line + draw(comments))
    return lines, nodes


few = settings(max_examples=max(5, settings.default.max_examples // 5))


@few
@given(drawn=hostfiles(), end=st.sampled_from(["", "\n", "\n\n"]), data=st.data())
def test_a_hostfile_says_which_node_leads(
    drawn: tuple[list[str], list[str]], end: str, data: st.DataObject, folder: Path
):
    lines, nodes = drawn
    node_rank = data.draw(st.integers(0, len(nodes)))
    done = launched(folder, "\n".join(lines) + end, node_rank)
    if node_rank == len(nodes):
        assert done.returncode == 2
        assert f"number the {len(nodes)} nodes of hosts from 0" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert f"<--node_rank><{node_rank}><--master_addr><{nodes[0]}>" in done.stdout


BAD_LINES = ["n7", "n7 slots=0", "n7 slots=-1", "n7 slots=two", "slots=2", "n7 slots=2 n8 slots=2"]
BAD_LINES += ["n7 slots=2,4", "n7  4", "n7:22 slots=2", "n7 slots=1\rn8 slots=1"]


@few
@given(drawn=hostfiles(), data=st.data())
def test_a_line_of_a_hostfile_that_is_wrong_is_told(
    drawn: tuple[list[str], list[str]], data: st.DataObject, folder: Path
):
    lines, nodes = drawn
    bad = data.draw(
        st.sampled_from([*BAD_LINES, f"{nodes[-1]} slots=3", f"you@{nodes[0]} slots=3"])
    )
    lines.insert(data.draw(st.integers(0, len(lines))), bad)
    done = launched(folder, "\n".join(lines), 0)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert re.search(r"launch/deepspeed.sh: hosts", done.stderr)
