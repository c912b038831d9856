"""MegatronEngine: the recipe's student as a model of Megatron-core, trained by its schedule.

This folder imports Megatron-core, so `engines/choose.py` imports it only for runs with `parallel`.
Start at `engine.py`; `chunks.py` builds the model, `weights.py` converts its weights.
"""
