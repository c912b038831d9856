"""Benchmarks of a step and of the teacher's scoring: time, memory and transfers.

Start at `step.py`, which `regate bench step` calls: `case.py` says what is measured, `arms.py` the
rows, `huggingface.py`, `pipeline.py` and `megatron.py` run them, `timing.py` and `measures.py`
take the figures, `table.py` shows them. They import the library, and of the recipe what reads YAML
and what builds Megatron's decoder.
"""
