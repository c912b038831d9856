"""The frozen text-only teacher: load it, place it on the ranks, and score label positions with it.

Files here may import the rooms below (`stores/`, `data/`, `families/`, `job/`), transformers and
deepspeed. Start at `api.py`, then read `scoring.py` (one batch) and `precompute.py` (all data).
"""
