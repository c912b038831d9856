"""The record of a task. What it calls imports its own files when it runs: --help is quick."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is needed to train and judge a small run from nothing."""

    about: str
    """One line for --help."""

    add_arguments: Callable[[ArgumentParser], None]
    """Arguments of `regate data NAME`; the defaults are the quickstart's sizes."""

    build_data: Callable[[Namespace], None]
    """Write train.json, test.json and images/ into the folder ``out``, by those arguments."""

    make_student: Callable[[Path, Path], Path]
    """Folder of a student, made from the training file; phases that are done lie in a cache."""

    config: Path
    """Settings of its run, model and data aside."""

    judged_by: str
    """The figure of a run's summary that says how well it does."""
