"""What `regate pretrain` is made of: text or captioned pictures, models from nothing, an objective.

It trains main model and helper in one DeepSpeed engine by an objective of `regate_ds/objectives/`.
Start at `trainer.py`; `config.py` says what can be set.
"""
