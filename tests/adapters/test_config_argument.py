"""Every host refuses a configuration that is a dict, in one line and before it does anything."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

KEYS: Any = {"keep_share": 0.3}
MODEL = nn.Linear(2, 2)


def loop() -> None:
    from regate_ds import attach

    attach(MODEL, KEYS, total_steps=3)


def pipeline() -> None:
    from regate_ds.adapters.deepspeed.pipeline_student import pipeline_student

    pipeline_student(MODEL, KEYS, num_stages=2)


def trainer() -> None:
    from regate_ds.adapters.trainers.hf_trainer import RegateTrainer

    RegateTrainer(model=MODEL, regate=KEYS)


def megatron() -> None:
    pytest.importorskip("megatron.core", reason="pip install 'regate-ds[megatron]'")
    from regate_ds.adapters.megatron import attach

    attach(MODEL, KEYS, total_steps=3)


@pytest.mark.parametrize("host", [loop, pipeline, trainer, megatron], ids=lambda f: f.__name__)
def test_keys_in_the_place_of_a_configuration_are_refused(host):
    with pytest.raises(ValueError, match="={'keep_share': 0.3}: must be a RegateConfig; write"):
        host()
