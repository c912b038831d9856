"""The suite tells of each use whether the package or the host is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from tests.families import uses
from tests.families.uses import USES, Use, measured
from tests.families.zoo.fp64 import in_fp64
from tests.families.zoo.models.table import FAMILIES

CHECKPOINTING, REENTRANT, LORA = USES[:3]


def found(name: str, use: Use) -> tuple[str, dict[str, Any]]:
    row: dict[str, Any] = {"execution": "elide", "at": ""}
    with in_fp64():
        return measured(FAMILIES[name], use, row), row


def test_what_a_host_gives_by_position_has_gradients_under_reentrant_checkpointing():
    assert found("gemma4_text", REENTRANT)[0] == "exact"


def test_a_host_that_cannot_recompute_is_named_in_the_row(monkeypatch):
    def refuse(host: Any, *, reentrant: bool) -> None:
        raise ValueError("Llama does not support it")

    monkeypatch.setattr(uses, "recompute", refuse)
    assert found("llama", CHECKPOINTING)[0] == "host: ValueError: Llama does not support it"


def test_layers_that_are_not_run_again_are_not_exact(monkeypatch):
    monkeypatch.setattr(uses, "recompute", lambda host, *, reentrant: None)
    assert found("llama", CHECKPOINTING)[0] == "host: of its 4 layers, [] are run again"


@pytest.mark.parametrize("use", [REENTRANT, LORA])
def test_an_adapter_that_gates_another_layer_is_wrong_and_no_fault_of_the_host(monkeypatch, use):
    attached = uses.attached

    def one_layer_off(model: Any, gated: range, execution: str) -> Any:
        return attached(model, range(gated.start - 1, gated.stop - 1), execution)

    monkeypatch.setattr(uses, "attached", one_layer_off)
    said, row = found("llama", use)
    assert said == "wrong"
    assert row["loss_error"] > 1e-4
