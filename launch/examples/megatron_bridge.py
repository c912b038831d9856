"""Run Megatron-Bridge's own `pretrain`, or its `finetune`, with elision.

    torchrun --nproc-per-node 8 launch/examples/megatron_bridge.py FILE MODULE:RECIPE [KEY=VALUE]...

FILE (YAML) holds the keys of LoopSettings (regate_ds/adapters/megatron/loops/deferred.py), as for
launch/pretrain_wrapper.py. A recipe is a function that returns Bridge's ConfigContainer, such as
megatron.bridge.recipes.llama:llama32_1b_pretrain_config; KEY=VALUE changes it, as in Bridge's own
scripts. With `checkpoint.pretrained_checkpoint=FOLDER` it is a fine-tuning. The data set of the
configuration must be scored before: docs/megatron_bridge.md.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from megatron.bridge.training import gpt_step, vlm_step
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

from regate_ds.adapters.megatron.loops.deferred import LoopSettings
from regate_ds.adapters.megatron.loops.megatron_bridge import installed_in_bridge
from regate_ds.settings.section import read_section
from regate_ds.settings.yaml import read_yaml

USAGE = "usage: megatron_bridge.py FILE MODULE:RECIPE [KEY=VALUE ...]"


def recipe(name: str) -> Any:
    """Return the configuration that MODULE:RECIPE makes; SystemExit if there is none."""
    module, _, function = name.partition(":")
    if not function:
        sys.exit(f"{name!r} names no recipe; {USAGE}")
    make = getattr(importlib.import_module(module), function, None)
    if make is None:
        sys.exit(f"{function}: not in {module}; give the name of a recipe there")
    return make()


def main(file: str, name: str, changes: list[str]) -> None:
    settings = read_section(LoopSettings, read_yaml(Path(file).read_text()), where="")
    config = process_config_with_overrides(recipe(name), cli_overrides=changes)
    # The loss is averaged over all targets of a step.
    config.model.calculate_per_token_loss, config.ddp.average_in_collective = True, False
    # Kept tokens carry their own rotary positions, which the fused kernel cannot take.
    config.model.apply_rope_fusion = False
    has_images = hasattr(config.model, "image_token_id")
    step = (vlm_step if has_images else gpt_step).forward_step
    run = pretrain if config.checkpoint.pretrained_checkpoint is None else finetune
    with installed_in_bridge(settings) as callback:
        run(config, step, callbacks=[callback])


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(USAGE)
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
