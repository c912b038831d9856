"""All tasks by name. A new task needs a file with its record, and a line here."""

from __future__ import annotations

from regate_ds.recipe.tasks.digits.task import DIGITS_TASK
from regate_ds.recipe.tasks.shapes.task import SHAPES_TASK
from regate_ds.recipe.tasks.task import Task

TASKS: dict[str, Task] = {"digits": DIGITS_TASK, "shapes": SHAPES_TASK}
