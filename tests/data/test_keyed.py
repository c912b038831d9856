"""Samples of a user's own data set get names, and its batches are read as tokens."""

from __future__ import annotations

import math
import pickle
from collections import UserDict
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.keyed import Keyed, KeyedCollate, PlainCollate


def stack(items: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([item[name] for item in items]) for name in items[0]}


class Lengths(list):
    """A data set that knows something of its items, as LLaVA's sampler asks for."""

    modality_lengths: ClassVar = [3, -5]


def item(number: int, **fields) -> dict:
    return {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "regate_key": ("mine", number), **fields}


def test_items_know_the_name_of_their_data_set_and_their_number():
    dataset = Keyed([{"text": "a"}, {"text": "b"}], "mine")
    assert len(dataset) == 2
    assert dataset[1] == {"text": "b", "regate_key": ("mine", 1)}


def test_a_data_set_whose_samples_have_no_number_is_refused():
    with pytest.raises(ValueError, match="generator has no length or no items by number"):
        Keyed((i for i in range(3)), "mine")


def test_the_host_collates_what_is_left_without_the_keys():
    seen = []
    KeyedCollate(lambda items: seen.extend(items) or stack(items))([item(3), item(4)])
    assert [set(each) for each in seen] == [{"input_ids", "labels"}] * 2


def test_labels_are_shifted_and_padding_is_read_off_the_mask():
    ignored = [IGNORE, 6, IGNORE]
    items = [item(3, attention_mask=[1, 1, 1]), item(4, attention_mask=[1, 1, 0], labels=ignored)]
    batch = KeyedCollate(stack)(items)
    assert batch.tokens.keys == ((("mine", 3),), (("mine", 4),))
    assert batch.tokens.segment_BT.tolist() == [[0, 0, 0], [0, 0, -1]]
    assert batch.tokens.labels_BT.tolist() == [[6, 7, IGNORE], [6, IGNORE, IGNORE]]
    assert set(batch.inputs) == {"input_ids", "attention_mask"}


def test_without_a_mask_every_position_is_real():
    assert KeyedCollate(stack)([item(0)]).tokens.segment_BT.tolist() == [[0, 0, 0]]


def test_images_are_numbered_by_what_is_given_or_by_the_batch_itself():
    items = [item(0), item(1, labels=[IGNORE] * 3)]
    own = [{**one, "regate_images": [n, n, -1]} for n, one in enumerate(items)]
    numbered = KeyedCollate(stack, lambda inputs: inputs["input_ids"] - 5)
    assert numbered(items).tokens.image_BT.tolist() == [[0, 1, 2], [0, 1, 2]]
    batch = numbered(own)
    assert batch.tokens.image_BT.tolist() == [[0, 0, -1], [1, 1, -1]]
    assert batch.inputs.keys() == {"input_ids"}
    assert KeyedCollate(stack)(items).tokens.image_BT is None


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(1, 2, dtype=torch.int64), r"torch.int64 \(1, 2\)"),
        (torch.zeros(1, 3), r"torch.float32 \(1, 3\)"),
        (torch.ones(1, 3, dtype=torch.bool), "torch.bool"),
        ([[0, 0, -1]], "list"),
    ],
)
def test_numbers_of_images_that_are_none_are_refused(images, found: str):
    with pytest.raises(ValueError, match=rf"has regate_images {found}.*labels' shape \(1, 3\)"):
        KeyedCollate(lambda items: {**stack(items), "regate_images": images})([item(3)])


def test_without_elision_the_host_gets_its_items_and_gives_what_it_likes():
    items = [item(0), "a text"]
    assert PlainCollate(list)(items) == [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, "a text"]
    assert PlainCollate(lambda given: None)(items) is None
    numbered = {"input_ids": 1, "regate_images": 2}
    assert PlainCollate(lambda given: numbered)(items) == {"input_ids": 1}
    assert PlainCollate(lambda given: UserDict(numbered))(items) == {"input_ids": 1}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([item(0), {"input_ids": [1], "labels": [1]}], "an item has no 'regate_key'; wrap the"),
        (["a text"], "an item has no 'regate_key'; .* make a stream's items dicts with a key"),
        *(
            ([{**item(0), "regate_key": key}], r"^an item's 'regate_key' is .*64 bits, as stream_k")
            for key in ("mine", None, ("mine", 1.5), ("mine", 2**63), ("mine", "0"), (0, "mine"))
        ),
        ([{"input_ids": [1], "regate_key": ("mine", 0)}], "the collated batch has labels NoneType"),
        ([item(0, attention_mask=[0, 1, 1])], "padding before tokens; set padding_side='right'"),
        (
            [item(0, attention_mask=[1, 1, 0]), item(1, attention_mask=[1, 0, 1])],
            r"^row 1: the attention_mask leaves out position 1 \(id 6\) among its tokens; where",
        ),
    ],
)
def test_a_batch_that_cannot_be_read_is_refused(items: list[dict], message: str):
    with pytest.raises(ValueError, match=message):
        KeyedCollate(stack)(items)


def test_a_collate_function_that_joins_samples_is_named():
    def flatten(items: list[dict]) -> dict[str, torch.Tensor]:
        return {name: each.reshape(1, -1) for name, each in stack(items).items()}

    message = r"made 1 rows \(1, 6\) of 2 samples, but by its rows there are 1; a collate .* joins"
    with pytest.raises(ValueError, match=message):
        KeyedCollate(flatten)([item(0), item(1)])


def test_attributes_of_the_data_set_pass_through_to_samplers():
    dataset = pickle.loads(pickle.dumps(Keyed(Lengths([{"a": 1}, {"a": 2}]), "mine")))
    assert dataset.modality_lengths == [3, -5]
    with pytest.raises(AttributeError, match="lengths"):
        _ = dataset.lengths


@pytest.mark.parametrize("wrap", [list, lambda items: Subset(items, [0, 1, 2])])
def test_a_loader_gets_keys_even_where_the_data_set_gives_several_items_at_once(wrap: Any):
    dataset = Keyed(wrap([{"a": number} for number in range(3)]), "mine")
    found = [item for batch in DataLoader(dataset, batch_size=2, collate_fn=list) for item in batch]
    assert found == [dataset[number] for number in range(3)]


def test_items_that_are_not_dicts_are_refused():
    with pytest.raises(ValueError, match="item 0 is a tuple"):
        Keyed([(1, 2)], "mine")[0]


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        ([{}], "", "the data set's name is ''; give a text"),
        ([{}], 7, "the data set's name is 7; give a text"),
        (
            {"train": [{}], "test": [{}]},
            "mine",
            r"items by name \(train, test\); give the data",
        ),
    ],
)
def test_what_gives_no_keys_is_refused_at_once(data: Any, name: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Keyed(data, name)


def test_a_sample_has_one_key_however_it_is_asked_for():
    keyed = Keyed([{"a": 1}, {"a": 2}], "mine")
    asked = [-1, 1, torch.tensor(1), np.int64(-1)]
    assert {keyed[number]["regate_key"] for number in asked} == {("mine", 1)}
    assert [one["regate_key"] for one in keyed.__getitems__([-2, 1])] == [("mine", 0), ("mine", 1)]
    with pytest.raises(ValueError, match=r"no item slice\(0, 2, None\): items are read by "):
        keyed[0:2]  # type: ignore[index]


@pytest.mark.parametrize("labels", [None, [[5, 6, 7]]])
def test_labels_that_are_no_tensor_are_refused(labels):
    with pytest.raises(ValueError, match=f"has labels {type(labels).__name__}, not a tensor"):
        KeyedCollate(lambda items: {**stack(items), "labels": labels})([item(3)])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.ones(1, 3), r"has labels torch.float32 \(1, 3\), not a tensor of whole numbers"),
        (torch.ones(3, dtype=torch.int64), r"has labels torch.int64 \(3,\), not a tensor"),
        (
            torch.tensor([[5, -1, 7]]),
            "the label at position 1 of row 0 is -1; a label is a",
        ),
    ],
)
def test_labels_that_no_loss_takes_are_refused(labels: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        KeyedCollate(lambda items: {**stack(items), "labels": labels})([item(3)])


def test_labels_that_are_shifted_already_are_refused():
    shifted = item(3, input_ids=[5, 6, 7, 8], labels=[IGNORE, 7, 8, IGNORE])
    with pytest.raises(ValueError, match="shifted: that at position 1 of row 0 is the token at 2"):
        KeyedCollate(stack)([shifted])


@pytest.mark.parametrize(
    "labels",
    [
        [IGNORE, 7, IGNORE, IGNORE],  # one other token may be meant
        [IGNORE, 7, 6, IGNORE],
        [5, 5, IGNORE, IGNORE],
    ],
)
def test_labels_that_are_other_tokens_are_the_collate_functions_own_affair(labels: list[int]):
    ids = [5, 6, 7, 8] if 5 not in labels else [5, 5, 5, 8]
    batch = KeyedCollate(stack)([item(3, input_ids=ids, labels=labels)])
    assert batch.tokens.labels_BT[0, 0] == labels[1]


@pytest.mark.parametrize("made", [None, (1, 2), [{"labels": 1}]])
def test_a_collate_function_that_makes_no_dict_is_named(made: Any):
    with pytest.raises(ValueError, match=f"function returned a {type(made).__name__}; make"):
        KeyedCollate(lambda items: made)([item(3)])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[0.0, 0.0, -1e9]], r"mask holds -1000000000.0; give the mask .*, not one that is added"),
        ([[1.0, 1.0, 0.5]], "mask holds 0.5; give the mask"),
        ([[1.0, 1.0, math.nan]], "mask holds nan; give the mask"),
        (
            [[False, False, True]],
            "row 0: the attention_mask is 0 at all positions .* wrong way",
        ),
        ([[0.0, 0.0, 0.0]], "row 0: the attention_mask is 0 at all positions .* wrong way"),
    ],
)
def test_a_mask_of_another_meaning_is_named(mask: list, message: str):
    made = {"attention_mask": torch.tensor(mask)}
    with pytest.raises(ValueError, match=message):
        KeyedCollate(lambda items: {**stack(items), **made})([item(3, labels=[5, 6, IGNORE])])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
def test_a_mask_may_be_of_any_type(dtype: torch.dtype):
    items = [item(0, attention_mask=[1, 1, 0], labels=[5, 6, IGNORE])]

    def collate(given: list[dict]) -> dict[str, torch.Tensor]:
        made = stack(given)
        return {**made, "attention_mask": made["attention_mask"].to(dtype)}

    assert KeyedCollate(collate)(items).tokens.segment_BT.tolist() == [[0, 0, -1]]


def test_an_empty_row_is_named():
    items = [item(0), item(1, attention_mask=[0, 0, 0], labels=[IGNORE] * 3)]
    with pytest.raises(ValueError, match="row 1 has no token by its attention_mask; leave empty"):
        KeyedCollate(stack)([{**items[0], "attention_mask": [1, 1, 1]}, items[1]])


def test_a_collate_function_that_sorts_the_samples_is_named():
    items = [item(0), item(1, input_ids=[8, 9, 7])]
    message = "row 0 of the collated batch has the tokens of item 1; .* not sort them by length"
    with pytest.raises(ValueError, match=message):
        KeyedCollate(lambda given: stack(given[::-1]))(items)
    # Cut samples, and items that are equal, are in their order.
    cut = KeyedCollate(lambda given: {n: x[:, :2] for n, x in stack(given).items()})(items)
    assert cut.tokens.keys == ((("mine", 0),), (("mine", 1),))
    KeyedCollate(lambda given: stack(given[::-1]))([item(0), item(1)])


class OnDevice(torch.Tensor):
    """Stands for a tensor on a device: it meets none in CPU memory until it is brought there."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        assert all(type(each) is cls for each in args if isinstance(each, torch.Tensor)), func
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("images", [{}, {"regate_images": [0, -1, -1]}])
def test_a_collate_function_may_put_its_batch_on_a_device(images: dict):
    def on_device(items: list[dict]) -> dict[str, torch.Tensor]:
        return {name: each.as_subclass(OnDevice) for name, each in stack(items).items()}

    def number(inputs: Any) -> torch.Tensor:
        return inputs["input_ids"] - 6

    items = [item(0, attention_mask=[1, 1, 0], labels=[5, 6, -100], **images)]
    found, wanted = (KeyedCollate(made, number)(items) for made in (on_device, stack))
    assert isinstance(found.inputs["input_ids"], OnDevice)
    for name in ("segment_BT", "labels_BT", "image_BT"):
        ours = getattr(found.tokens, name)
        assert type(ours) is torch.Tensor
        assert ours.equal(getattr(wanted.tokens, name))
