"""Run what a round lacks: data, students, stores, training runs and costs, in this order.

Each training run is a process of one thread; ``jobs`` of them run at once. A run that fails is
named at the end, and the others go on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.learning.files import (
    Arm,
    LearningTask,
    Round,
    RunKey,
    keys_of,
    read_file,
    settings_digest,
)
from regate_ds.recipe.learning.result import Result, finished, path_of, student_of
from regate_ds.recipe.learning.task_folder import TaskFolder, cost_file, once_costs, stores_of
from regate_ds.stores.atomic_file import make_folder, write_atomically

COST_STEPS = 40
"""Steps of the runs that take turns to be timed."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A round with its files read, and the folders that it works in."""

    name: str
    """Of the round."""

    plan: Round
    tasks: dict[str, LearningTask]
    arms: dict[str, Arm]
    work: Path
    """Folder of data, students and runs; it may be deleted once the results are there."""

    results: Path

    @classmethod
    def read(cls, files: Path, name: str, *, work: Path, results: Path) -> Bench:
        plan = read_file(Round, files / "rounds", name)
        return cls(
            name=name,
            plan=plan,
            tasks={task: read_file(LearningTask, files / "tasks", task) for task in plan.tasks},
            arms={arm: read_file(Arm, files / "arms", arm) for arm in plan.arms},
            work=work,
            results=results,
        )

    def folder(self, task: str) -> TaskFolder:
        return TaskFolder(folder=self.work / task, task=self.tasks[task])

    def finished(self) -> list[tuple[RunKey, Result]]:
        """Return the results that are there; ValueError if one is of other settings."""
        found = [(key, finished(path_of(self.results, key), self.digest(key))) for key in self.keys]
        return [(key, result) for key, result in found if result is not None]

    def require_student(self, task: str, seed: int, student: Path) -> None:
        """Refuse, by ValueError, to put runs beside those of another student of the seed."""
        mine = student_of(student)
        for key, result in self.finished():
            if (key.task, key.seed) == (task, seed) and result.student != mine:
                raise ValueError(
                    f"{task} {key.name} started from student {result.student}, this machine makes "
                    f"{mine} of the seed; delete the results of the seed, or run it where they "
                    "were made"
                )

    @property
    def keys(self) -> list[RunKey]:
        return list(keys_of(self.plan, self.tasks))

    def missing(self) -> list[RunKey]:
        done = {key for key, _ in self.finished()}
        return [key for key in self.keys if key not in done]

    def digest(self, key: RunKey) -> str:
        return settings_digest(self.tasks[key.task], self.arms[key.arm], key)

    def cost_path(self, task: str, seed: int) -> Path:
        return self.results / task / "costs" / f"{self.name}-seed{seed}.json"

    def cost_key(self, task: str, arm: str, seed: int) -> RunKey:
        """Return the run whose steps are timed."""
        return RunKey(
            task=task, part=self.plan.part, arm=arm, seed=seed, steps=COST_STEPS, fraction=1.0
        )


def run_missing(bench: Bench, *, jobs: int, say: Callable[[str], None]) -> list[str]:
    """Run what is missing, and return a line for each run that failed."""
    missing, failed = bench.missing(), []
    for task, seed in dict.fromkeys((key.task, key.seed) for key in missing):
        own = [key for key in missing if (key.task, key.seed) == (task, seed)]
        say(f"{task}, seed {seed}: {len(own)} of {len(missing)} runs")
        student, refused = _prepare(bench, own, say)
        failed += refused.values()
        bench.require_student(task, seed, student)
        ready = [key for key in own if key.arm not in refused]
        train = partial(_train, bench, student, say)
        with ThreadPoolExecutor(jobs) as pool:
            # Alone, a run is started from this thread, which may be interrupted.
            lines = list((map if jobs == 1 else pool.map)(train, ready))
        failed += [line for line in lines if line is not None]
    return failed


def _prepare(
    bench: Bench, keys: Sequence[RunKey], say: Callable[[str], None]
) -> tuple[Path, dict[str, str]]:
    """Make data, student and stores of one task and seed.

    Returns the student's folder, and a line for each arm whose settings or store failed.
    """
    first = keys[0]
    folder = bench.folder(first.task)
    folder.build_data(first.part)
    say(f"{first.task}, seed {first.seed}: student")
    student = folder.make_student(first.seed)
    refused: dict[str, str] = {}
    for key in keys:
        if key.arm in refused:
            continue
        try:
            config = folder.write(folder.tree(bench.arms[key.arm], key, student), _file_name(key))
        except ValueError as error:
            refused[key.arm] = f"{key.task} {key.name} was not run: {error}"
            continue
        for job, store in stores_of(load_config(config)).items():
            if (line := _fill(job, config, store, say)) is not None:
                refused[key.arm] = f"{key.task} {key.name} was not run: {line}"
    return student, refused


def _fill(job: str, config: Path, store: Path, say: Callable[[str], None]) -> str | None:
    """Compute a store that is not there; return a line if that fails."""
    if cost_file(store).is_file():
        return None
    say(f"{job}, {store.name}")
    # A store without its cost was left by a killed job.
    shutil.rmtree(store, ignore_errors=True)
    code, log = run_job("once_job", [job, str(config), str(cost_file(store))], store)
    return f"{job} failed with exit code {code}: {log}" if code else None


def _train(bench: Bench, student: Path, say: Callable[[str], None], key: RunKey) -> str | None:
    """Run one training run; return a line if it fails."""
    folder = bench.folder(key.task)
    config = folder.write(folder.tree(bench.arms[key.arm], key, student), _file_name(key))
    out = load_config(config).run.out
    # What a killed run left.
    shutil.rmtree(out, ignore_errors=True)
    path = path_of(bench.results, key)
    told = [str(config), str(path), key.arm, str(key.seed), str(key.fraction), bench.digest(key)]
    code, log = run_job("train_job", told, out)
    found = None if code else finished(path, bench.digest(key))
    if found is None:
        return f"{key.task} {key.name} failed with exit code {code}: {log}"
    shutil.rmtree(out, ignore_errors=True)
    say(f"{key.task} {key.name}: image words {found.accuracy_visual:.3f}")
    return None


def measure_costs(bench: Bench, task: str, seed: int, say: Callable[[str], None]) -> None:
    """Time a dense and a sparse step of every arm of the round, which take turns in one process."""
    folder, path = bench.folder(task), bench.cost_path(task, seed)
    keys = [key for key in bench.keys if (key.task, key.seed) == (task, seed)]
    student, refused = _prepare(bench, keys, say)
    for line in refused.values():
        say(line)
    told, digests = [], {}
    for arm in (one for one in bench.plan.arms if one not in refused):
        key = bench.cost_key(task, arm, seed)
        digests[arm] = bench.digest(key)
        config = folder.write(folder.tree(bench.arms[arm], key, student), f"cost-{arm}")
        told.append(f"{arm}={config}")
    say(f"{task}, seed {seed}: costs of {len(told)} arms")
    steps = bench.work / task / "step-costs.json"
    code, log = run_job("cost_job", [str(steps), *told], steps)
    if code:
        raise RuntimeError(f"the costs of {task} failed with exit code {code}: {log}")
    configs = {
        arm: load_config(Path(config)) for arm, _, config in (s.partition("=") for s in told)
    }
    found = {
        "digests": digests,
        "steps": json.loads(steps.read_text()),
        "once": {arm: sum(once_costs(config).values()) for arm, config in configs.items()},
    }
    make_folder(path.parent)
    write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())


def run_job(job: str, arguments: Iterable[str], log: Path) -> tuple[int, Path]:
    """Run one of the benchmark's jobs in a process of one thread; return its exit code and log."""
    path = log.with_name(f"{log.name}.log")
    make_folder(path.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    command = [sys.executable, "-m", f"regate_ds.recipe.learning.{job}", *arguments]
    with path.open("wb") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=file, check=False)
    return done.returncode, path


def _file_name(key: RunKey) -> str:
    return f"{key.part}-{key.name}"
