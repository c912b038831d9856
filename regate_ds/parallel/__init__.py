"""Groups of ranks, and every collective that the method itself calls over them.

Files here import torch and each other, nothing else; groups are arguments, and none is a global.
Start at `layout.py` for the groups, then `collectives.py`; `resharding.py` moves rows for Megatron.
"""
