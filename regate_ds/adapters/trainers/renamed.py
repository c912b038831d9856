"""Load a checkpoint whose weights have other names than the model's.

transformers writes many models (LLaVA, Qwen2.5-VL, Gemma 3) under the names of older versions.
``from_pretrained`` translates them. Trainer, in one process or under DDP, does not: it warns of
missing keys, and goes on with the weights that the model happens to have. Seen with transformers
5.24; this may go when Trainer loads what it has saved.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger(__name__)


def lost_weights(model: Any, missing: Iterable[str]) -> list[str]:
    """Return the names among ``missing`` whose weights are not loaded under another name either, as
    tied ones are."""
    state, missing = model.state_dict(), set(missing)
    loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
    return sorted(n for n in missing & state.keys() if state[n].data_ptr() not in loaded)


def load_renamed(model: Any, folder: str | Path, lost: list[str]) -> None:
    """Load all weights of a checkpoint into ``model``, in place, as ``from_pretrained`` reads them.

    lost: names of weights that Trainer did not find there.

    RuntimeError if from_pretrained does not find them either.
    """
    # No weight is rounded on its way through the other model.
    dtype = reduce(torch.promote_types, (p.dtype for p in model.parameters()))
    found, info = type(model).from_pretrained(
        folder, config=model.config, dtype=dtype, output_loading_info=True
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise RuntimeError(
            f"{folder} does not have {len(lost)} of the model's weights, as {lost[0]}; resume "
            "from a checkpoint of this model"
        )
    model.load_state_dict(found.state_dict())
    _log.warning(
        "%s has %d weights under other names, as transformers writes them: they were loaded by "
        "from_pretrained",
        folder,
        len(lost),
    )
