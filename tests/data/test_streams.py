"""Samples of a stream have keys that stay, and train as those of a map-style data set do."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from torch import nn
from torch.utils.data import DataLoader

from regate_ds import Keyed, Loop, ReferenceStore, Teacher, attach, score_dataset, stream_key
from regate_ds.stores.spool import Spool, write_spool
from tests.adapters.torch.runs_helper import Items, collate
from tests.house.test_docs import blocks
from tests.support.models import causal_lm
from tests.support.paths import ROOT
from tests.support.planning import config_of
from tests.support.ranks import run_ranks
from tests.support.samples import make_samples
from tests.teacher.reference_job_helper import files_of

NUM_ITEMS, EPOCHS = 12, 2


def test_a_key_says_which_item_it_is_and_never_changes():
    assert stream_key("set", "a.tar", "0001") == ("set", KNOWN)
    told = [("ab", "c"), ("a", "bc"), ("abc",), ("1",), (1,), ("a", "b", "c"), (-1,)]
    numbers = {stream_key("set", *parts)[1] for parts in told}
    assert len(numbers) == len(told)
    assert all(0 <= number < 2**63 for number in numbers)


KNOWN = 4729226042406634952


@pytest.mark.parametrize("parts", [(), (None,), (1.0,), (True,), (b"a",)])
def test_a_key_of_nothing_or_of_other_things_is_refused(parts: tuple):
    with pytest.raises(ValueError, match=r"^stream_key\('set'\) got .*; give texts or whole"):
        stream_key("set", *parts)


def test_what_is_spooled_comes_back(tmp_path: Path):
    samples = make_samples(7)
    write_spool(tmp_path, iter(samples))
    spool = Spool(tmp_path)
    assert len(spool) == 7
    for wanted, found in zip(samples, spool, strict=True):
        assert found.key == wanted.key
        for name in ("input_ids_S", "labels_S", "is_placeholder_S"):
            assert torch.equal(getattr(found, name), getattr(wanted, name))


def teacher_of(seed: int = 5) -> Teacher:
    torch.manual_seed(seed)
    return Teacher(model=causal_lm(), pad_id=1, tokens_per_batch=64)


def stream(number: int = NUM_ITEMS) -> Iterator[dict[str, Any]]:
    data = Keyed(Items(number), "mine")
    return (data[n] for n in range(number))


def test_a_stream_makes_the_store_of_the_same_samples_by_number(tmp_path: Path):
    score_dataset(Keyed(Items(NUM_ITEMS), "mine"), collate, teacher_of(), tmp_path / "numbered")
    assert score_dataset(stream(), collate, teacher_of(), tmp_path / "stream").num_tokens > 0
    assert files_of(tmp_path / "stream") == files_of(tmp_path / "numbered")
    assert score_dataset(stream(), collate, teacher_of(), tmp_path / "stream").num_tokens == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbered", "stream"]


def test_a_killed_job_scores_only_what_is_missing(tmp_path: Path, monkeypatch):
    score_dataset(stream(), collate, teacher_of(), tmp_path / "whole")
    score_dataset(stream(), collate, teacher_of(), tmp_path / "store")
    wanted = files_of(tmp_path / "whole")
    (tmp_path / "store" / "shard-00000.fp16").unlink()
    # What a job leaves that was killed while it read the stream.
    (tmp_path / "store.spool").mkdir()
    (tmp_path / "store.spool" / "ids.npy").write_bytes(b"half")
    found = score_dataset(stream(), collate, teacher_of(), tmp_path / "store")
    num_tokens = sum(len(item["input_ids"]) for item in stream())
    assert 0 < found.num_tokens < num_tokens
    assert files_of(tmp_path / "store") == wanted
    assert not (tmp_path / "store.spool").exists()


def test_a_stream_that_cannot_be_used_is_refused_in_a_line(tmp_path: Path):
    def score(items: Any) -> None:
        score_dataset(items, collate, teacher_of(), tmp_path / "store")

    read = stream()
    list(read)
    with pytest.raises(ValueError, match="^the stream gave no item; give one that has not been"):
        score(read)
    with pytest.raises(ValueError, match="^an item has no 'regate_key'; "):
        score({"input_ids": i["input_ids"], "labels": i["labels"]} for i in stream())
    with pytest.raises(ValueError, match="^sample 'mine' record 0 is in the data twice"):
        score([*stream(2), *stream(2)])
    with pytest.raises(ValueError, match="^the stream gave a tuple; .* dicts, one for each sample"):
        score([("a", "b")])
    with pytest.raises(ValueError, match=r"^an item's 'regate_key' is \[\('mine',\), tensor"):
        score(DataLoader(list(stream(2))))
    with pytest.raises(
        ValueError, match="^sample 'mine' record 1 has the token 21474836.*; give ids and labels"
    ):
        score(dict(item, labels=item["labels"] + n * 2**31) for n, item in enumerate(stream(2)))


def test_a_stream_that_breaks_off_leaves_nothing_behind(tmp_path: Path):
    def broken() -> Iterator[dict[str, Any]]:
        yield from stream(3)
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="the network is gone"):
        score_dataset(broken(), collate, teacher_of(), tmp_path / "store")
    with pytest.raises(ValueError, match="is in the data twice"):
        score_dataset([*stream(2), *stream(2)], collate, teacher_of(), tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def write_shards(folder: Path) -> list[str]:
    """Two shards, whose items have the same names in both."""
    paths = []
    for shard in range(2):
        paths.append(str(folder / f"shard-{shard}.tar"))
        with tarfile.open(paths[-1], "w") as file:
            for number in range(NUM_ITEMS // 2):
                item = Items()[shard * NUM_ITEMS // 2 + number]
                content = json.dumps({name: row.tolist() for name, row in item.items()}).encode()
                about = tarfile.TarInfo(f"{number:04d}.json")
                about.size = len(content)
                file.addfile(about, BytesIO(content))
    return paths


def encode(item: dict[str, Any]) -> dict[str, Any]:
    rows = {name: torch.tensor(row) for name, row in item["json"].items()}
    return {**rows, "regate_key": item["regate_key"]}


def padded(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """As a user's collate function pads."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [item["input_ids"] for item in items]
    return {
        "input_ids": pad(ids, True, 0),
        "labels": pad([item["labels"] for item in items], True, -100),
        "attention_mask": pad([torch.ones_like(row) for row in ids], True, 0),
    }


def script() -> tuple[nn.Module, dict[str, Any]]:
    """What a user's script has before the page's block."""
    model = causal_lm()
    return model, {
        "Loop": Loop,
        "ReferenceStore": ReferenceStore,
        "DataLoader": DataLoader,
        "attach": attach,
        "score_dataset": score_dataset,
        "stream_key": stream_key,
        "collate": padded,
        "config": config_of(warmup=1, final_dense_share=0.0),
        "encode": encode,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05),
        "teacher": teacher_of(),
        "wds": webdataset,
        "EPOCHS": EPOCHS,
        "T": 20,
    }


def test_the_page_trains_as_a_run_over_numbered_samples(tmp_path: Path, monkeypatch):
    (block,) = (block for block, _ in blocks(ROOT / "docs" / "streams.md") if "wds." in block)
    weights = []
    for samples in (None, lambda: Keyed(Items(NUM_ITEMS), "mine")):
        folder = tmp_path / str(len(weights))
        folder.mkdir()
        monkeypatch.chdir(folder)
        model, names = script()
        names["SHARDS"] = write_shards(folder)
        head, body = block.split("\n\n\n")[:2], block.split("\n\n\n")[2]
        exec("\n".join(head), names)
        if samples is not None:
            names["samples"] = samples
        exec(body, names)
        metrics = names["regate"].metrics()
        assert metrics["answer_kept"] < metrics["answer_total"]
        weights.append([weight.detach().clone() for weight in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def check_two_ranks(rank: int, folder: str) -> None:
    class Refused:
        """As a loader, whose workers begin to read once it is asked for an iterator."""

        def __iter__(self) -> Iterator[dict[str, Any]]:
            raise AssertionError("only the first rank reads the stream")

    group: Any = torch.distributed.group.WORLD
    items = stream() if rank == 0 else Refused()
    score_dataset(items, collate, teacher_of(), Path(folder) / "two", group)
    fails = (1 / 0 for _ in range(3))
    error: Any = ZeroDivisionError if rank == 0 else RuntimeError
    with pytest.raises(error, match="division by zero"):
        score_dataset(fails, collate, teacher_of(), Path(folder) / "fails", group)


@pytest.mark.slow
def test_two_ranks_write_the_files_of_one(tmp_path: Path):
    score_dataset(stream(), collate, teacher_of(), tmp_path / "one")
    run_ranks(check_two_ranks, 2, str(tmp_path))
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
