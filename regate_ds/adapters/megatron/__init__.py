"""Token elision inside Megatron-core models; ``attach`` is where to begin reading."""

from regate_ds.adapters.megatron.attach import attach
from regate_ds.adapters.megatron.regate import MegatronRegate

__all__ = ["MegatronRegate", "attach"]
