"""What a run will need and keep, without training it: bytes, plans of an epoch, thousands of ranks.

It imports the library, the configuration, the students and the corpus. Start at `needs.py`, which
`regate doctor` prints; `plan_walk.py` is `run.plan_only=true`, `megatron_world.py` a script.
"""
