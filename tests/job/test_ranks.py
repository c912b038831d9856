import socket

import pytest

from regate_ds.job.ranks import RANK_NAMES, Ranks, announce, discover, first_host, job_port

GROUP = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
RANK = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **GROUP}
TORCHRUN = {**RANK, "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "4"}
DEEPSPEED = {**RANK, "CROSS_RANK": "1", "CROSS_SIZE": "4"}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


def srun(task: int, tasks: int, **more: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "20123",
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task % 2),
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_JOB_NODELIST": "gpu[01-04]",
        "SLURM_STEP_NODELIST": "gpu[03-04]",
        "SLURMD_NODENAME": f"gpu0{3 + task // 2}",
        **more,
    }


def test_a_process_that_nobody_announced_is_alone():
    assert discover({}) == Ranks("none", node=socket.gethostname())
    assert discover(srun(0, 1)).world_size == 1


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        (TORCHRUN, "torchrun"),
        (DEEPSPEED, "deepspeed"),
        (srun(0, 4) | TORCHRUN, "torchrun"),
        (srun(2, 4) | DEEPSPEED, "deepspeed"),
        (srun(0, 1) | TORCHRUN, "torchrun"),
    ],
)
def test_ranks_of_a_launcher_are_its_own_also_inside_tasks_of_srun(environment, launcher):
    assert discover(environment) == Ranks(launcher, 3, 8, 1, "1", "n1", 29500)


def test_ranks_set_by_hand_in_each_task_are_the_tasks():
    by_hand = {name: value for name, value in RANK.items() if name != "LOCAL_RANK"}
    found = discover(srun(3, 8) | by_hand)
    assert (found.launcher, found.rank, found.local_rank) == ("environment", 3, 1)


def test_tasks_of_srun_are_ranks_whose_address_and_port_come_from_the_job():
    environment = srun(3, 4)
    assert announce(environment) == Ranks("srun", 3, 4, 1, "gpu04", "gpu03", 10_123)
    assert [environment[name] for name in RANK_NAMES] == ["3", "4", "1", "gpu03", "10123"]
    assert discover(environment).rank == 3


def test_address_and_port_of_a_job_can_be_overridden():
    found = discover(srun(1, 2, MASTER_ADDR="10.0.0.1", MASTER_PORT="77"))
    assert (found.address, found.port) == ("10.0.0.1", 77)


def test_tasks_of_mpirun_are_ranks():
    environment = MPIRUN | GROUP
    found = announce(environment)
    assert (found.launcher, found.rank, found.world_size, found.local_rank) == ("mpirun", 3, 8, 1)
    assert (environment["RANK"], environment["MASTER_PORT"]) == ("3", "29500")


def test_mpirun_inside_a_slurm_job_has_its_own_ranks_and_the_jobs_address():
    found = discover(srun(1, 2) | MPIRUN)
    assert (found.rank, found.world_size, found.address) == (3, 8, "gpu03")


PMI = {"PMI_RANK": "3", "PMI_SIZE": "8"}


@pytest.mark.parametrize(
    "local", ["MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "MV2_COMM_WORLD_LOCAL_RANK"]
)
def test_tasks_of_mpiexec_are_ranks(local):
    environment = PMI | GROUP | {local: "1"}
    found = announce(environment)
    assert (found.launcher, found.rank, found.world_size, found.local_rank) == ("mpiexec", 3, 8, 1)
    assert (environment["RANK"], environment["LOCAL_RANK"]) == ("3", "1")


@pytest.mark.parametrize(
    ("launcher", "names"),
    [
        ("jsrun", ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK")),
        ("mpiexec", ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK")),
        ("flux run", ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID")),
        ("mpiexec", ("PMI_RANK", "PMI_SIZE", "FLUX_TASK_LOCAL_ID")),
    ],
)
def test_tasks_of_other_launchers_are_ranks(launcher, names):
    environment = dict(zip(names, ("3", "8", "1"))) | GROUP
    found = announce(environment)
    assert (found.launcher, found.rank, found.world_size, found.local_rank) == (launcher, 3, 8, 1)
    assert environment["RANK"] == "3"


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2", **GROUP},
        {"LOCAL_RANK": "1"},
        {"LOCAL_WORLD_SIZE": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_SIZE": "2"},
        {"PMIX_RANK": "0"},
        {"PALS_RANKID": "0"},
        {"GROUP_WORLD_SIZE": "2"},
        {"SLURM_PROCID": "1"},
        {"SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "0"},
    ],
)
def test_a_process_with_some_variables_of_a_task_is_not_alone(environment):
    """A container passes some of the variables on, and drops others."""
    name, value = next(iter(environment.items()))
    with pytest.raises(
        ValueError, match=f"^{name}={value} tells of several tasks, but no variable"
    ):
        discover(environment)


def test_a_lone_process_may_say_so():
    alone = {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    assert discover(alone).world_size == 1


def test_srun_that_speaks_pmi_is_srun_and_a_single_task_of_mpiexec_runs_alone():
    found = discover(srun(3, 8) | PMI)
    assert (found.launcher, found.rank, found.world_size) == ("srun", 3, 8)
    assert discover({"PMI_RANK": "0", "PMI_SIZE": "1"}).world_size == 1


def test_mpiexec_inside_a_slurm_job_has_its_own_ranks_and_the_jobs_address():
    found = discover(srun(1, 2) | PMI | {"MPI_LOCALRANKID": "1"})
    assert (found.launcher, found.rank, found.world_size, found.address) == (
        "mpiexec",
        3,
        8,
        "gpu03",
    )
    assert found.local_rank == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (PMI | GROUP, "PMI_RANK=3, PMI_SIZE=8, but none of MPI_LOCALRANKID, .* is set"),
        (
            PMI | {"MPI_LOCALRANKID": "0"},
            "mpiexec says .*, but MASTER_ADDR is not set: .*mpiexec -g",
        ),
        ({"PMI_RANK": "1"}, "PMI_SIZE=None: must be a whole number"),
        ({"PMI_RANK": "0", "PMI_SIZE": "0"}, "PMI_RANK=0, PMI_SIZE=0: mpiexec counts from 0"),
        ({"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2"}, "but FLUX_TASK_LOCAL_ID is not set"),
        (RANK | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000: must be from 1 to 65535"),
        (RANK | {"RANK": "1\n2"}, "RANK=1 2: must be a whole number"),
        (srun(3, 16) | PMI | {"MPI_LOCALRANKID": "0"}, "srun says .*, mpiexec says PMI_RANK=3"),
        (srun(3, 8) | TORCHRUN, "torchrun says GROUP_RANK=1, GROUP_WORLD_SIZE=4, srun says SLURM"),
        (srun(3, 8) | DEEPSPEED, "deepspeed says CROSS_RANK=1, CROSS_SIZE=4, srun says SLURM_PROC"),
        (srun(2, 8) | RANK, "RANK=3, WORLD_SIZE=8, but srun says SLURM_PROCID=2, SLURM_STEP_NUM_"),
        (srun(3, 4) | RANK, "RANK=3, WORLD_SIZE=8, but srun says SLURM_PROCID=3, SLURM_STEP_NUM_"),
        (MPIRUN | RANK | {"RANK": "2"}, "RANK=2, WORLD_SIZE=8, but mpirun says OMPI_COMM_WORLD_RA"),
        (srun(3, 16) | MPIRUN, "srun says SLURM_PROCID=3, .* mpirun says OMPI_COMM_WORLD_RANK=3"),
        (MPIRUN, "mpirun says .*, but MASTER_ADDR is not set: .*mpirun -x"),
        (MPIRUN | {"MASTER_ADDR": "n1"}, "mpirun says .*, but MASTER_PORT is not set"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "SLURM_NTASKS=4, but this process is no task"),
        ({"RANK": "1", "MASTER_PORT": "1"}, "RANK=1, but WORLD_SIZE, MASTER_ADDR not set"),
        ({"RANK": "1", "WORLD_SIZE": "2", **GROUP}, "RANK=1, but LOCAL_RANK not set"),
        (RANK | {"RANK": "8"}, "RANK=8, but WORLD_SIZE=8: ranks count from 0"),
        (RANK | {"RANK": "one"}, "RANK=one: must be a whole number"),
    ],
)
def test_what_cannot_hold_is_one_line_that_names_both(environment, message):
    with pytest.raises(ValueError, match=message) as error:
        discover(environment)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-07,12],login1", "gpu03"),
        ("gpu[7,3]", "gpu7"),
        ("rack[2-3]node[01-16]", "rack2node01"),
        ("login1,gpu[1-2]", "login1"),
        ("a-b.c[10-12]-ib", "a-b.c10-ib"),
    ],
)
def test_the_first_host_of_a_list_of_nodes(nodes, first):
    assert first_host(nodes) == first


def test_ports_of_jobs_stay_below_those_that_linux_gives_out():
    assert {job_port(job) // 10_000 for job in (0, 19_999, 20_000, 123_456_789)} <= {1, 2}
