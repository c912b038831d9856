"""A run's checkpoint in Megatron-core's distributed format: writing, reading, and what is trusted.

Start at `shards.py`; `trusted.py` looks at what would be unpickled.
"""
