"""Tasks that come with the project: their data, a student made on the spot, and what judges a run.

A task is a folder with one record (`task.py` says what it holds) and a line in `table.py`; what
tasks share is `answers.py`, `files.py` and `pretraining/`. Tasks may import all of the recipe; the
rest of the recipe does not import them, only `regate data` does. Start at `quickstart.py`, which
runs a task from nothing to the comparison of its runs. docs/recipe.md says how to add one.
"""
