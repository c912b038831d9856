"""Why a class is refused: what the adapter says of it, and what becomes of it if it is let in.

A class without a record is refused before anything of it is looked at, which is no reason. So it is
tried once, on one micro-batch of text, as if it had the record of a usual decoder: the line that
refuses it then, or how it fails, is the reason.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from regate_ds.families.hosts import HOSTS, Host
from regate_ds.families.text_decoders import TEXT_DECODERS, TextDecoder
from tests.families.rows import TOLERANCE, attached, is_refusal
from tests.families.zoo.cases import Case
from tests.families.zoo.compare import attached_run, gradient_error, loss_error, oracle_run

TRIED = range(1, 4)
UNCOMPARED = "no record: nobody has compared it beyond this trial, which was exact"

_NO_RECORD = "is not supported"
"""How the refusal of what has no record ends."""


def reason(model: Any, cases: list[Case], refusal: str) -> str:
    """Return one clause: why the class is refused. Its own name is "it" there."""
    text = next(case for case in cases if case.name == "text")
    model_type = model.config.get_text_config(decoder=True).model_type
    name, host = type(model).__name__, Host(decoders=(model_type,))
    found = clause(refusal)
    if found.endswith(_NO_RECORD):
        decoders = {} if model_type in TEXT_DECODERS else {model_type: TextDecoder()}
        with patch.dict(TEXT_DECODERS, decoders), patch.dict(HOSTS, {name: host}):
            found = _tried(model, text)
    return found.replace(name, "it")


def _tried(model: Any, case: Case) -> str:
    plan = case.plan("answers")
    try:
        with attached(model, TRIED):
            found = attached_run(model, case.inputs, plan)
    except Exception as error:  # the reason
        return clause(str(error)) if is_refusal(error) else _failed(error)
    wanted = oracle_run(model, case.inputs, plan, TRIED)
    worst = max(loss_error(found, wanted), gradient_error(found, wanted)[0])
    return UNCOMPARED if worst <= TOLERANCE else "its results are wrong"


def clause(message: str) -> str:
    """Return what a message says is wrong, without the way out."""
    return message.split("; ")[0].rstrip(".")


def _failed(error: Exception) -> str:
    return f"it fails with {type(error).__name__}: {str(error).splitlines()[0][:120]}"
