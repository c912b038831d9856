"""The samples of joined rows are told apart by what a batch says of them, or it is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.keyed import KeyedCollate

NAMES = ("position_ids", "cu_seq_lens_q", "seq_idx")


def item(number: int, length: int) -> dict[str, Any]:
    ids = [1 + (7 * number + place) % 50 for place in range(length)]
    return {"input_ids": ids, "labels": list(ids), "regate_key": ("mine", number)}


def joined(rows: list[list[int]], padding: int = 0, names: tuple[str, ...] = NAMES) -> Any:
    """A collate function that joins its items into rows of these lengths, and padding."""

    def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        width, rest = max(map(sum, rows)) + padding, iter(items)
        batch: dict[str, list[list[int]]] = {name: [] for name in ("input_ids", "labels", *NAMES)}
        bounds = [0]
        for row in rows:
            ids, positions, numbers = [], [], []
            for number, length in enumerate(row):
                ids += next(rest)["input_ids"]
                positions += range(length)
                numbers += [number] * length
                bounds.append(bounds[-1] + length)
            empty = width - len(ids)
            if empty:
                bounds.append(bounds[-1] + empty)
            batch["input_ids"].append(ids + [0] * empty)
            batch["labels"].append(ids + [IGNORE] * empty)
            batch["position_ids"].append(positions + [0] * empty)
            batch["seq_idx"].append(numbers + [len(row)] * empty)
        made = {name: torch.tensor(each) for name, each in batch.items() if each}
        made["cu_seq_lens_q"] = torch.tensor(bounds, dtype=torch.int32)
        gone = set(NAMES) - set(names)
        return {name: value for name, value in made.items() if name not in gone}

    return collate


@pytest.mark.parametrize("seed", range(30))
def test_samples_are_found_in_any_rows_by_any_way_of_telling(seed: int):
    rng = random.Random(seed)
    rows = [[rng.randint(1, 6) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(1, 3))]
    names = tuple(rng.sample(NAMES, rng.randint(1, 3)))
    lengths = [length for row in rows for length in row]
    items = [item(number, length) for number, length in enumerate(lengths)]
    padding = rng.choice([0, 3])
    batch = KeyedCollate(joined(rows, padding, names))(items)
    number, width = 0, max(map(sum, rows)) + padding
    for row, segments in enumerate(batch.tokens.segment_BT.tolist()):
        wanted = [place for place, length in enumerate(rows[row]) for _ in range(length)]
        assert segments == wanted + [-1] * (width - len(wanted))
        count = len(rows[row])
        assert batch.tokens.keys[row] == tuple(("mine", number + n) for n in range(count))
        targets = [
            target
            for one in items[number : number + count]
            for target in [*one["input_ids"][1:], IGNORE]
        ]
        assert batch.tokens.labels_BT[row].tolist() == targets + [IGNORE] * (width - len(targets))
        number += count
    assert set(batch.inputs) == {"input_ids", *names} - {"cu_seq_lens_q", "seq_idx"}


def test_images_are_numbered_in_their_samples():
    images = torch.tensor([[-1, 0, 0, 1, -1, 2, -1, 3, 4]])
    batch = KeyedCollate(joined([[4, 2, 3]]), lambda _: images)(
        [item(0, 4), item(1, 2), item(2, 3)]
    )
    assert batch.tokens.image_BT is not None
    assert batch.tokens.image_BT.tolist() == [[-1, 0, 0, 1, -1, 0, -1, 0, 1]]


def test_an_item_of_several_samples_has_a_list_of_keys():
    packed = {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5]}
    packed |= {"position_ids": [0, 1, 0, 1, 2], "regate_key": [("mine", 7), ["mine", 9]]}

    def stack(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.tensor([item[name] for item in items]) for name in items[0]}

    tokens = KeyedCollate(stack)([packed]).tokens
    assert tokens.keys == ((("mine", 7), ("mine", 9)),)
    assert tokens.segment_BT.tolist() == [[0, 0, 1, 1, 1]]
    with pytest.raises(ValueError, match="of 1 samples, but by position_ids there are 2; give an"):
        KeyedCollate(stack)([{**packed, "regate_key": ("mine", 7)}])
    with pytest.raises(ValueError, match=r"^an item's 'regate_key' is \('mine', 'x'\)"):
        KeyedCollate(stack)([{**packed, "regate_key": [("mine", 7), ("mine", "x")]}])


ROWS = torch.arange(6)[None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1]])}, "seq_idx and cu_seq_lens_q differ on wh"),
        ({"cu_seq_lens_q": [0, 6]}, "seq_idx and cu_seq_lens_q differ on whether .* at position 4"),
        (
            {"cu_seq_lens_q": [0, 4, 5]},
            r"cu_seq_lens_q are \[0, 4, 5\]; give rising bounds .* 6 pos",
        ),
        ({"cu_seq_lens_q": [0, 4, 4, 6]}, "give rising bounds from 0"),
        ({"cu_seq_lens_k": [0, 2, 6]}, "seq_idx and cu_seq_lens_k differ"),
        ({"position_ids": ROWS}, "seq_idx and position_ids differ on whether a sample begins"),
        ({"position_ids": ROWS[:, :5]}, r"position_ids \(1, 5\), which elision cannot read"),
        ({"position_ids": ROWS[None].expand(2, 3, 1, 6)}, "which elision cannot read"),
        (
            {"position_ids": torch.tensor([[[0, 1, 2, 3, 0, 1]]]).expand(3, 1, 6)},
            r"begin again at position 4 of row 0, which the model would not take",
        ),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 2, 2]])}, r"numbers the samples .*up to 2"),
        (
            {"attention_mask": torch.ones(1, 1, 6, 6)},
            r"an attention_mask \(1, 1, 6, 6\) for labels",
        ),
        ({"attention_mask": {"full_attention": None}}, "an attention_mask dict for labels"),
        ({"input_ids": ROWS}, "whose tokens are not those of the items in their order"),
    ],
)
def test_a_batch_that_contradicts_itself_or_its_items_is_refused(changes: Any, message: str):
    collate = joined([[4, 2]])

    def changed(items: list[dict[str, Any]]) -> dict[str, Any]:
        return {**collate(items), **changes}

    with pytest.raises(ValueError, match=message):
        KeyedCollate(changed)([item(0, 4), item(1, 2)])


def test_a_sample_that_reaches_into_the_next_row_is_refused():
    collate = joined([[4], [4]], names=("cu_seq_lens_q",))
    bounds = {"cu_seq_lens_q": torch.tensor([0, 2, 8])}
    with pytest.raises(ValueError, match="let a sample reach from one row into the next"):
        KeyedCollate(lambda items: {**collate(items), **bounds})([item(0, 4), item(1, 4)])


def test_padding_at_the_origin_of_three_axes_is_no_sample():
    batch = {"input_ids": torch.tensor([[1, 2, 3, 0]]), "labels": torch.tensor([[1, 2, 3, IGNORE]])}
    batch |= {"attention_mask": torch.tensor([[1, 1, 1, 0]])}
    batch |= {"position_ids": torch.tensor([[[0, 1, 2, 0]]]).expand(3, 1, 4)}
    tokens = KeyedCollate(lambda items: batch)([item(0, 3)]).tokens
    assert tokens.segment_BT.tolist() == [[0, 0, 0, -1]]


def test_positions_with_gaps_are_no_rows_of_one_sample():
    """transformers takes a gap for the begin of another sample where it makes its masks."""
    collate = joined([[4]], names=())
    gap = {"position_ids": torch.tensor([[0, 1, 5, 6]])}
    with pytest.raises(ValueError, match="of 1 samples, but by position_ids there are 2"):
        KeyedCollate(lambda items: {**collate(items), **gap})([item(0, 4)])
