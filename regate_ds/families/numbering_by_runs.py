"""The images of families whose templates put other tokens between any two of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regate_ds.algorithm.batch import number_runs


def lengths_of_runs(config: Any, inputs: Mapping[str, Any]) -> dict[int, list[int]]:
    """Return the length of each run of placeholders. A tile between its tags is a run.

    ValueError if the inputs have a size for each image, and the runs are of another number.
    """
    is_image_BT = inputs["input_ids"] == config.image_token_id
    lengths: list[int] = []
    for run_T in number_runs(is_image_BT):
        lengths += torch.bincount(run_T[run_T >= 0]).tolist()
    sizes = inputs.get("image_sizes")
    if sizes is not None and len(sizes) != len(lengths):
        raise ValueError(
            f"the batch has {len(sizes)} images, but {len(lengths)} runs of placeholders; put "
            "another token between any two images, or number them by 'regate_images'"
        )
    return {config.image_token_id: lengths}
