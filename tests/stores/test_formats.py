"""What an older or newer version wrote is refused in one line that says how to make it anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regate_ds.config import RegateConfig
from regate_ds.session import Regate
from regate_ds.stores import answer_index
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.difficulty import indexed, stream
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.difficulty.stream import StreamDifficulty
from regate_ds.stores.reference.lifecycle import begin_store
from regate_ds.stores.reference.manifest import MANIFEST_NAME, Manifest
from regate_ds.stores.values import Stores
from tests.support.samples import make_index

INDEX = make_index(3)
STORE_AGAIN = r"in an empty folder \(regate teacher CONFIG, or score_dataset\)$"
RUN_AGAIN = r"start the run anew \(regate train CONFIG, with another run\.out\)$"


def test_a_store_of_another_format(tmp_path: Path):
    begin_store(tmp_path / "store", INDEX, "teacher", lambda _: [torch.arange(3)], 64)
    manifest = next((tmp_path / "store").glob("*.json"))
    written = Manifest.load(tmp_path / "store", manifest.name)
    (tmp_path / MANIFEST_NAME).write_bytes(replace(written, format=1).to_bytes())
    with pytest.raises(ValueError, match=f"has store format 1, .* {STORE_AGAIN}"):
        Manifest.load(tmp_path)


def test_an_index_of_another_format(tmp_path: Path, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(answer_index, "INDEX_FORMAT", 2)
        INDEX.save(tmp_path / "index.npz")
    with pytest.raises(ValueError, match=f"has index format 2, .* {STORE_AGAIN}"):
        AnswerIndex.load(tmp_path / "index.npz")


@pytest.mark.parametrize(
    ("module", "name", "make"),
    [
        (indexed, "SIDECAR_FORMAT", lambda: DifficultyStore(INDEX)),
        (stream, "STREAM_FORMAT", StreamDifficulty),
    ],
)
def test_difficulty_of_another_format(tmp_path: Path, monkeypatch, module, name: str, make):
    with monkeypatch.context() as older:
        older.setattr(module, name, 1)
        make().save(tmp_path)
    with pytest.raises(ValueError, match=f"has difficulty format 1, .* {RUN_AGAIN}"):
        make().load(tmp_path)


def test_a_checkpoint_of_another_format():
    session = Regate(RegateConfig(keep_share=1.0), Stores(), total_steps=4)
    state = session.state_dict()
    for version in (1, None):
        with pytest.raises(ValueError, match=f"has state version {version}, .* {RUN_AGAIN}"):
            session.load_state_dict({**state, "version": version})
