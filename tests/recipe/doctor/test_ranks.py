from pathlib import Path

import pytest
import torch

from regate_ds.job.process import Process
from regate_ds.recipe.doctor import ranks as doctor_ranks
from regate_ds.recipe.doctor.check import Check
from regate_ds.recipe.doctor.ranks import examine_together, groups_of
from tests.support.ranks import run_ranks

EIGHT = ["a"] * 4 + ["b"] * 4


def test_groups_are_the_world_and_the_nodes():
    groups = groups_of(EIGHT, {})
    assert groups == {"world": [list(range(8))], "node": [[0, 1, 2, 3], [4, 5, 6, 7]]}


def test_groups_of_a_layout_are_megatrons():
    groups = groups_of(EIGHT, {"tensor": 2, "pipeline": 2})
    assert groups["tensor"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups["data"] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert groups["pipeline"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert "context" not in groups


def test_context_lies_between_tensor_and_data():
    groups = groups_of(EIGHT, {"tensor": 2, "context": 2})
    assert groups["context"] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert groups["data"] == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_ranks_that_do_not_fit_a_layout_are_refused():
    with pytest.raises(ValueError, match="parallel.tensor=3: 8 ranks are no multiple of 3"):
        groups_of(EIGHT, {"tensor": 3})


def version(number: str, *, is_fine: bool = True) -> Check:
    return Check("torch", number, True, is_fine, is_version=True)


def check_job(rank: int, folder: str) -> None:
    """Two nodes of one rank each; then each in turn with something wrong on the second."""
    doctor_ranks.SECONDS_TO_SEE = 0.2
    process, here, node = Process(rank, 2, torch.device("cpu")), Path(folder), f"n{rank}"

    def examine(own: Check, where: Path = here) -> dict[str, Check]:
        found = examine_together(process, node, [own], {"tensor": 2}, where)
        return {check.name: check for check in found}

    found = examine(version("1.0"))
    assert all(check.is_fine for check in found.values()), found
    assert found["ranks"].found == "2 on 2 nodes"
    assert found["sum over world"].found.startswith("1 x 2 ranks: 16 MiB in ")
    assert found["sum over node"].found.startswith("2 x 1 ranks")
    assert "sum over tensor" in found
    assert list(here.glob(".regate*")) == []

    other = examine(version(f"1.{rank}"))["torch"]
    assert (other.is_fine, other.advice[:14]) == (False, "1.1 on rank 1:")
    worse = examine(version("1.0", is_fine=rank == 0))["torch"]
    assert (worse.is_fine, worse.advice) == (False, "on rank 1: 1.0")

    own = here / node
    own.mkdir()
    apart = examine(version("1.0"), own)["shared folder"]
    assert not apart.is_fine
    assert apart.advice.startswith("rank 0 does not see what ranks 1 wrote")
    missing = examine(version("1.0"), here if rank == 0 else here / "none")["shared folder"]
    assert not missing.is_fine


def test_ranks_find_each_other_their_versions_and_their_folder(tmp_path):
    run_ranks(check_job, 2, str(tmp_path))
