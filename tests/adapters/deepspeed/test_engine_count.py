"""What a DeepSpeed engine has counted is held against the windows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.adapters.deepspeed.test_loop import batches, engine, first_window, made, run


def test_a_window_that_begins_within_a_step_of_the_engine_is_refused():
    _, regate = made()
    with pytest.raises(RuntimeError, match=r"2 of the 3 micro-batches .* call engine.step\(\)"):
        first_window(regate, batches(), engine(micro_steps=5))


@pytest.mark.parametrize(
    ("knobs", "counted"),
    [
        ({}, {"micro_steps": 6}),
        ({}, {"micro_steps": 5, "_is_gradient_accumulation_boundary": False}),
        ({"enabled": False}, {"micro_steps": 5}),
    ],
)
def test_steps_that_end_and_boundaries_set_by_hand_and_runs_without_elision_are_not(
    knobs: dict, counted: dict
):
    _, regate = made(**knobs)
    assert len(first_window(regate, batches(), engine(**counted))) == 3


def test_a_resume_that_loads_the_engine_alone_is_told(tmp_path, caplog):
    model, regate = made()
    run(regate, model, batches(), engine())
    regate.save(tmp_path)

    def resumed(used: SimpleNamespace, *, loads: bool) -> str:
        caplog.clear()
        _, again = made()
        if loads:
            again.load(tmp_path)
        first_window(again, batches(), used)
        return caplog.text

    assert "1 optimizer steps before, but no state" in resumed(engine(global_steps=1), loads=False)
    assert resumed(engine(global_steps=1), loads=True) == ""
    assert resumed(engine(), loads=False) == ""
