"""ReGATE for training loops of the user's own, around plain torch, DDP, FSDP2, accelerate or a
DeepSpeed engine.

`host.py` says what a loop's host must tell, and each host is a file: `plain.py` (with the public
``Loop``), `accelerator.py`, `engine.py`. `loop.py` is the run, the same under all of them. The
model itself is changed by `huggingface/`. Start at `attach.py`.
"""
