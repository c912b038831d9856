"""The engines that run a run's steps: ZeroEngine (`deepspeed.py`) and MegatronEngine (`megatron/`).

They import the library's adapters, the configuration, the corpus and the students. The training
loop sees only their interface. Start at `base.py`, which is that interface, then `choose.py`.
"""
