"""Choose the engine of a run; the rest of the run is the same with either.

ZeroEngine        DeepSpeed's engine around the Hugging Face student (deepspeed.py)
MegatronEngine    Megatron-core's model, schedule and optimizer (megatron/engine.py)
"""

from __future__ import annotations

from regate_ds.job.process import Process
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.engines.base import Engine, Setup


def data_ranks(config: RunConfig, process: Process) -> Process:
    """Return this process among the ranks that read different samples. Collective.

    With `parallel` this also makes Megatron-core's groups.
    """
    if config.parallel is None:
        return process
    from regate_ds.recipe.engines.megatron.groups import join

    return join(config, process)


def make_engine(setup: Setup) -> Engine:
    if setup.config.parallel is None:
        from regate_ds.recipe.engines.deepspeed import ZeroEngine

        return ZeroEngine.build(setup)
    from regate_ds.recipe.engines.megatron.engine import MegatronEngine

    return MegatronEngine.build(setup)
