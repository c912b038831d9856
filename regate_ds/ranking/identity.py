"""Name the tower and the projector by what decides their features."""

from __future__ import annotations

from typing import Any

from regate_ds.families.table import family_of
from regate_ds.teacher.identity import name_by_hash, relevant_settings


def vision_id(model: Any) -> str:
    """Name the part of a model that turns images into tokens, by a hash over its configuration and
    weights; the text decoder does not count."""
    family = family_of(model)
    settings = {k: v for k, v in model.config.to_dict().items() if k != "text_config"}
    weights = [
        (name, weight)
        for name, weight in sorted(model.model.state_dict().items())
        if not name.startswith(f"{family.decoder}.")
    ]
    return name_by_hash(family.model_type, relevant_settings(settings), weights)
