"""The record of a task. Its functions import their files when they run, so that --help is quick."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StudentFields:
    """Fields of a student's config that differ from the task's own."""

    text: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of the decoder, such as ``num_hidden_layers``."""

    vision: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of the vision tower."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is needed to train and judge a small run from nothing."""

    about: str
    """One line for --help."""

    add_arguments: Callable[[ArgumentParser], None]
    """Adds the arguments of `regate data NAME`; the defaults are the quickstart's sizes."""

    build_data: Callable[[Namespace], None]
    """Writes train.json, test.json and images/ into the folder ``out`` of those arguments."""

    make_student: Callable[[Path, Path, int, StudentFields], Path]
    """Makes a student from the training file and a cache folder, and returns its folder.

    Its seed is given, and fields that are laid over those of the quickstart's.
    """

    config: Path
    """YAML file with the settings of the task's runs; model and data are overridden."""

    judged_by: str
    """Key of the figure in a run's summary that says how well the run does."""
