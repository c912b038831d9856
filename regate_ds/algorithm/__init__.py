"""The method itself: score targets, plan what is kept, gate the layers, sum the loss.

Every function depends on its arguments alone. Files here import torch and each other, nothing else.
Start at `batch.py` (what is known of a micro-batch), then read `select.py` and `plan.py`.
"""
