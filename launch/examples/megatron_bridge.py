"""Pretrain a model of a Megatron-Bridge recipe with elision. Not yet run with CUDA, which it needs.

    torchrun --nproc-per-node 8 launch/examples/megatron_bridge.py FILE llama32_1b_pretrain_config

FILE (YAML) holds the keys of LoopSettings (regate_ds/adapters/megatron/loops/deferred.py), as for
launch/pretrain_wrapper.py; a recipe is a function of megatron.bridge.recipes.llama. Its data are
mock data: to train on your own, set ``config.dataset`` and score it (docs/megatron_bridge.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron.bridge.recipes import llama
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

from regate_ds.adapters.megatron.loops.deferred import LoopSettings
from regate_ds.adapters.megatron.loops.megatron_bridge import installed_in_bridge
from regate_ds.settings.section import read_section
from regate_ds.settings.yaml import read_yaml


def main(file: str, recipe: str) -> None:
    settings = read_section(LoopSettings, read_yaml(Path(file).read_text()), where="")
    if not hasattr(llama, recipe):
        sys.exit(f"{recipe}: not in megatron.bridge.recipes.llama; give the name of a recipe there")
    config = getattr(llama, recipe)()
    # The loss is averaged over all targets of a step.
    config.model.calculate_per_token_loss, config.ddp.average_in_collective = True, False
    # Kept tokens carry their own rotary positions, which the fused kernel cannot take.
    config.model.apply_rope_fusion = False
    with installed_in_bridge(settings) as callback:
        pretrain(config, forward_step, callbacks=[callback])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: megatron_bridge.py FILE RECIPE")
    main(*sys.argv[1:])
