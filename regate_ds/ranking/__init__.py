"""Compute the orders of image tokens once, before training.

Files here may import the rooms below (`stores/`, `families/`, `teacher/`) and torch, and no
framework. Start at `api.py` for a loop of your own, then read `job.py`, which both it and
`regate rank` run.
"""
