"""Token elision inside Megatron-core models; ``attach`` is where to begin reading."""

from regate_ds.adapters.megatron.attach import MegatronRegate, attach

__all__ = ["MegatronRegate", "attach"]
