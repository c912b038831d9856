"""Manifests and states are read back as they were written; a damaged one is told by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regate_ds.adapters.session_state import STATE_FOLDER, read_state
from regate_ds.recipe.cache.entry import open_data, read_entry
from regate_ds.recipe.run_folder import RunFolder
from regate_ds.recipe.saving.contents import COMPLETE, Contents, Done, read_contents
from regate_ds.stores.difficulty.sidecars import read_sidecar, write_sidecar
from regate_ds.stores.image_orders.manifest import OrdersManifest, OrdersShard
from regate_ds.stores.kind import MANIFEST_NAME, sealed
from regate_ds.stores.reference.manifest import Manifest, Shard
from tests.recipe.cache.cache_helper import GOOD, source, write

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
counts = st.integers(0, 2**70)
hashes = st.none() | texts

manifests = st.builds(
    Manifest,
    fingerprint=texts,
    teacher_id=texts,
    index_sha256=texts,
    rows_sha256=texts,
    shards=st.lists(st.builds(Shard, counts, counts, counts, texts, hashes), max_size=3).map(tuple),
    column=st.sampled_from(["text", "student", "gain"]),
)
orders = st.builds(
    OrdersManifest,
    fingerprint=texts,
    ranking=texts,
    model_id=hashes,
    batch=counts,
    pictures_sha256=texts,
    shards=st.lists(st.builds(OrdersShard, counts, counts, texts, hashes), max_size=3).map(tuple),
)
contents = st.builds(
    Contents,
    done=st.builds(
        Done,
        step=counts,
        fingerprint=texts,
        samples_per_step=counts,
        num_ranks=counts,
        layout=texts,
        figures=texts,
    ),
    checksums=st.dictionaries(texts, counts, max_size=3),
)
states = st.fixed_dictionaries({"step": counts, "elision": st.dictionaries(texts, counts)})
arrays = st.dictionaries(
    st.text("abc.", min_size=1, max_size=5),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3).map(lambda x: np.array(x, np.int64)),
    max_size=3,
).map(lambda given: {**given, "format": np.array(3)})


def _write_contents(folder: Path, made: Contents) -> None:
    fields = {"done": asdict(made.done), "checksums": dict(made.checksums)}
    (folder / COMPLETE).write_bytes(sealed(fields))


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    (folder / STATE_FOLDER).mkdir(exist_ok=True)
    (folder / STATE_FOLDER / "state.json").write_bytes(sealed(state))


def _read_arrays(folder: Path) -> dict[str, Any]:
    found = read_sidecar(folder / "difficulty-0-of-1.npz", 3)
    return {name: array.tolist() for name, array in found.items()}


@dataclass(frozen=True)
class Kind:
    """A file that we write: what may be in it, and who reads it."""

    name: str
    made: st.SearchStrategy[Any]
    write: Callable[[Path, Any], object]
    read: Callable[[Path], Any]
    tells: bool = True
    """Whether a changed byte is found, as by a checksum."""


KINDS = [
    Kind(
        MANIFEST_NAME,
        manifests,
        lambda folder, made: (folder / MANIFEST_NAME).write_bytes(made.to_bytes()),
        Manifest.load,
    ),
    Kind(
        MANIFEST_NAME,
        orders,
        lambda folder, made: (folder / MANIFEST_NAME).write_bytes(made.to_bytes()),
        OrdersManifest.load,
    ),
    Kind(COMPLETE, contents, _write_contents, read_contents),
    Kind(
        "difficulty-0-of-1.npz",
        arrays,
        lambda folder, made: write_sidecar(folder / "difficulty-0-of-1.npz", made),
        _read_arrays,
    ),
    Kind(f"{STATE_FOLDER}/state.json", states, _write_state, read_state),
    Kind(
        "summary.json",
        states,
        lambda folder, made: RunFolder(folder).write_summary(made),
        lambda folder: RunFolder(folder).summary(),
        tells=False,
    ),
    Kind(
        "metrics.jsonl",
        states,
        lambda folder, made: (folder / "metrics.jsonl").write_text(json.dumps(made) + "\n"),
        lambda folder: RunFolder(folder).metrics(),
        tells=False,
    ),
]

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name}")


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """Change some bytes of a file."""
    start = draw(st.integers(0, len(content) - 1))
    length = draw(st.integers(0, 8))
    end = len(content) if draw(st.integers(0, 9)) == 0 else start + length
    bit = bytes([content[start] ^ (1 << draw(st.integers(0, 7)))]) + content[start + 1 : end]
    new = draw(st.sampled_from([bit, b"", content[start:end] * 2]) | st.binary(max_size=8))
    return content[:start] + new + content[end:]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def plain(kind: Kind, made: Any) -> Any:
    if kind.name.endswith(".npz"):
        return {name: array.tolist() for name, array in made.items()}
    return [made] if kind.name == "metrics.jsonl" else made


@kinds
@given(data=st.data())
def test_what_was_written_is_read_back(kind: Kind, data: st.DataObject, folder: Path):
    made = data.draw(kind.made)
    kind.write(folder, made)
    assert kind.read(folder) == plain(kind, made)


@kinds
@given(data=st.data())
def test_a_damaged_file_is_told_by_its_name_or_read_as_it_was(
    kind: Kind, data: st.DataObject, folder: Path
):
    made = data.draw(kind.made)
    kind.write(folder, made)
    path = folder / kind.name
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    try:
        found = kind.read(folder)
    except ValueError as error:
        (line,) = str(error).splitlines()
        assert str(path) in line
    else:
        assert not kind.tells or found == plain(kind, made)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("cache")
    of = source(write(folder, GOOD))
    return of, open_data(of, [folder]).folder


@given(data=st.data())
def test_a_damaged_cache_is_told_or_holds_the_same_samples(
    data: st.DataObject, cache: tuple[Any, Path]
):
    of, entry = cache
    files = sorted(path for path in entry.iterdir() if path.stat().st_size)
    path = data.draw(st.sampled_from(files))
    before = path.read_bytes()
    path.write_bytes(data.draw(damaged(before)))
    try:
        found = read_entry(of, entry)
    except ValueError as error:
        (line,) = str(error).splitlines()
        assert str(entry) in line
    else:
        assert path.name == MANIFEST_NAME or path.read_bytes() == before
        assert len(found.records) == len(GOOD)
    finally:
        path.write_bytes(before)
