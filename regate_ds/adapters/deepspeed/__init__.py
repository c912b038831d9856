"""ReGATE for training loops around a DeepSpeed engine.

`attach.py`, `loop.py` and `checks.py` serve a loop of the user's own under ZeRO; the files that
begin with `pipeline` serve DeepSpeed's pipeline parallelism. The model itself is changed by
`huggingface/`, which this folder may import together with DeepSpeed. Start at `attach.py`, or at
`pipeline.py` for a pipeline.
"""
