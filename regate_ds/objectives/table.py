"""All objectives by name. A new one needs a file with its config, and a line here."""

from __future__ import annotations

from typing import Any

from regate_ds.objectives.free_language_modeling import FreeLanguageModeling
from regate_ds.objectives.multi_choice import MultiChoice
from regate_ds.objectives.plain import Causal, Masked
from regate_ds.objectives.replaced_token import ReplacedToken

OBJECTIVES: dict[str, Any] = {
    "replaced_token": ReplacedToken,
    "multi_choice": MultiChoice,
    "free_language_modeling": FreeLanguageModeling,
    "masked": Masked,
    "causal": Causal,
}
"""The contract is `contract.py:Objective`."""
