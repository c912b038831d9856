"""What several ranks need of a family with images, seen in one process.

A micro-batch of text runs an empty image: same bits, and a gradient for every parameter that a
micro-batch with images reaches. And its images are told apart by its inputs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from regate_ds.adapters.huggingface.gates import attach_model
from regate_ds.families.numbering import numbering_of
from regate_ds.families.table import find_family
from tests.families.zoo.cases import Case
from tests.families.zoo.compare import attached_run


def empty_image(model: Any, cases: list[Case]) -> str:
    """Return "yes" or "no"; ValueError if the empty image is wrong."""
    if find_family(model) is None:
        return "no"
    plain, model = copy.deepcopy(model), copy.deepcopy(model)
    attach_model(plain)
    attach_model(model, run_tower_without_image=True)
    by_name = {case.name: case for case in cases}
    text, images = by_name["text"], by_name["images"]
    found = attached_run(model, text.inputs, text.plan("answers"))
    wanted = attached_run(plain, text.inputs, text.plan("answers"))
    seeing = attached_run(plain, images.inputs, images.plan("answers"))
    if lacking := sorted(seeing.gradients.keys() - found.gradients.keys()):
        raise ValueError(f"the empty image reaches no {lacking}")
    # Under ZeRO ranks reduce what has a gradient: no rank may have one that others lack.
    only_here = found.gradients.keys() - wanted.gradients.keys() - seeing.gradients.keys()
    if only_here:
        raise ValueError(f"images do not reach {sorted(only_here)}, but the empty image does")
    same = [torch.equal(found.gradients[name], each) for name, each in wanted.gradients.items()]
    if found.loss != wanted.loss or not all(same):
        raise ValueError("the empty image changes the loss or a gradient of text")
    return "yes"


def told_apart(model: Any, cases: list[Case]) -> str:
    """Return "yes" or "no"; ValueError if images are numbered wrongly."""
    family = find_family(model)
    if family is None or family.image_lengths is None:
        return "no"
    case = next(one for one in cases if one.name == "images")
    number_images = numbering_of(model, elides_images=True)
    found = number_images({**case.inputs, "labels": case.batch.labels_BT})
    assert case.batch.image_BT is not None
    if found is None or not torch.equal(found, case.batch.image_BT):
        raise ValueError(f"images are numbered {found}, not {case.batch.image_BT}")
    return "yes"
