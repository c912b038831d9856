"""Tiny random models of the families that people train, and the slow oracle that judges them.

`models/` has the families, `cases.py` makes micro-batches of one, and `oracle.py` says what a
plan's loss is by the host's own forward. `tests/families/run.py` runs all.
"""
