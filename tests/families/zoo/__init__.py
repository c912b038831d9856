"""Tiny random models of the families that people train, and the slow oracle that judges them.

`families.py` lists the families, `build.py` makes a model of one, `cases.py` its micro-batches, and
`oracle.py` says what a plan's loss is by the host's own forward. `tests/families/run.py` runs all.
"""
