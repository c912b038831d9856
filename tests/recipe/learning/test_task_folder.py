"""Data and stores are found again by what made them, and by nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from regate_ds.recipe.learning.files import Arm, LearningTask, RunKey, Tree
from regate_ds.recipe.learning.task_folder import TaskFolder

KEY = RunKey(task="t", part="dev", arm="mine", seed=0, steps=4, fraction=1.0)


def folder_of(path: Path, **other: Any) -> TaskFolder:
    (path / "run.yaml").write_text("elision: {images: {ranking: pixels}}")
    task = LearningTask(
        about="x",
        builder="digits",
        config=path / "run.yaml",
        steps=4,
        num_train=8,
        num_dev=4,
        num_test=4,
        test_seed=9,
    )
    return TaskFolder(folder=path / "work", task=replace(task, **other))


def stores(folder: TaskFolder, student: str = "student-a", **settings: Any) -> tuple[str, str]:
    tree: Tree = folder.tree(Arm(about="x", settings=settings), KEY, Path(student))
    return tree["teacher"]["store"], tree["rank"]["store"]


def test_data_of_other_sizes_or_seeds_are_others(tmp_path: Path):
    folder = folder_of(tmp_path)
    for other in ({"num_train": 9}, {"num_dev": 5}, {"dev_seed": 1}, {"frames": 2}):
        assert folder_of(tmp_path, **other).data("dev") != folder.data("dev")
    assert folder_of(tmp_path, num_test=5).data("test") != folder.data("test")
    longer = folder_of(tmp_path, steps=9)
    assert (longer.train, longer.data("test")) == (folder.train, folder.data("test"))


def test_stores_of_another_student_or_teacher_are_others(tmp_path: Path):
    folder = folder_of(tmp_path)
    teacher, orders = stores(folder)
    assert stores(folder, elision={"keep_share": 0.25}) == (teacher, orders)
    assert stores(folder_of(tmp_path, num_test=5)) == (teacher, orders)
    other_teacher, same_orders = stores(folder, teacher={"path": "other"})
    assert other_teacher != teacher
    assert same_orders == orders
    assert not {teacher, orders} & set(stores(folder, student="student-b"))
    assert not {teacher, orders} & set(stores(folder_of(tmp_path, num_train=9)))
