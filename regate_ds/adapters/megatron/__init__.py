"""Token elision inside Megatron-core models and its schedules.

`attach.py` puts hooks into a model and `regate.py` is what it returns; `loops/` does both in loops
that the user does not edit. These files may import Megatron-core and the files beside this folder,
but no other host's adapter. Start at `attach.py`, then read `gates.py` and `schedule.py`.
"""

from regate_ds.adapters.megatron.attach import attach
from regate_ds.adapters.megatron.regate import MegatronRegate

__all__ = ["MegatronRegate", "attach"]
