"""ReGATE for trainer classes that own the training loop.

Each trainer has one file: `hf_trainer.py` for `transformers.Trainer`, `trl_sft.py` for TRL's
SFTTrainer, `llama_factory.py` and `ms_swift.py` for those frameworks. `limits.py` refuses what
Trainer can do and elision cannot, `state.py` keeps the state beside Trainer's own, `logged.py` has
what Trainer logs, `scored.py` lets the teacher read what a trainer has prepared, and `packed.py`
tells the samples of packed rows. These files may import the trainer's framework and the adapter in
`torch/`. Start at `RegateMixin` in `hf_trainer.py`.
"""
