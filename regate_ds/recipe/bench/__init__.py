"""Benchmarks: CPU time of sparse and dense steps, and time and memory of the teacher's scoring.

They import the library and no other folder of the recipe. Start at `step.py`, which `regate bench`
calls; `harness.py` has what the benchmarks share.
"""
