"""ReGATE for trainer classes that own the training loop.

Each trainer has one file, and `hf_trainer.py`, for `transformers.Trainer`, is the only one so far.
These files may import the trainer's framework and the adapter in `torch/`. Start at `RegateMixin`
in `hf_trainer.py`.
"""
