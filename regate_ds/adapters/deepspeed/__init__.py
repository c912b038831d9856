"""ReGATE in DeepSpeed's pipeline parallelism. Start at `pipeline.py`.

A loop around a DeepSpeed engine with ZeRO is one of the loops in `torch/`. The model itself is
changed by `huggingface/`, which this folder may import together with DeepSpeed.
"""
