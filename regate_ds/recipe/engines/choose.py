"""What carries out a run's steps; all else of a run is the same under every host.

ZeroEngine   an engine around the Hugging Face student (deepspeed_host.py)
MegatronEngine    Megatron-core's schedule and optimizer (megatron/host.py)
"""

from __future__ import annotations

from regate_ds.job.process import Process
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.engines.base import Engine, Setup


def data_ranks(config: RunConfig, process: Process) -> Process:
    """This process among those that read different samples; sets up what else is parallel."""
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
