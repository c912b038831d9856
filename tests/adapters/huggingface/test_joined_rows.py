"""Rows into which a collate function joins several samples: as if each had a row of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening

from regate_ds import Keyed, Loop, attach
from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.keyed import KeyedCollate
from tests.adapters.huggingface.plain_flash_helper import PlainFlash, uses_flash
from tests.support.measure import assert_gradients_equal, gradients
from tests.support.models import IMAGE_TOKEN, causal_lm, qwen2_vl, random_batch
from tests.support.planning import config_of
from tests.support.stores import RandomReference, index_of

LENGTHS = (9, 21, 16, 25)
GRIDS = ((1, 4, 6), None, (2, 4, 4), (1, 8, 4))
"""Temporal steps, rows and columns of patches of each sample's image or clip."""

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


def text_items() -> list[dict[str, list[int]]]:
    """Unlike the host's collate function, leave a first label in place: nothing predicts it."""
    items = []
    for number, length in enumerate(LENGTHS):
        ids_BT, tokens = random_batch([[length]], seed=number)
        labels = tokens.labels_BT.roll(1, 1)[0].tolist()
        items.append({"input_ids": ids_BT[0].tolist(), "labels": labels})
    return items


def picture_items() -> list[dict[str, Any]]:
    items, generator = [], torch.Generator().manual_seed(5)
    for item, grid in zip(text_items(), GRIDS, strict=True):
        ids, labels = item["input_ids"], item["labels"]
        if grid is None:
            items.append({**item, "pixels": None, "grid": None})
            continue
        num_patches = grid[0] * grid[1] * grid[2]
        pixels = torch.randn(num_patches, 3 * 2 * 4 * 4, generator=generator)
        image = [IMAGE_TOKEN] * (num_patches // 4)
        joined = {"input_ids": [ids[0], *image, *ids[1:]]}
        joined["labels"] = [IGNORE, *[IGNORE] * len(image), *labels[1:]]
        items.append({**joined, "pixels": pixels, "grid": grid})
    return items


def padded(items: list[dict[str, Any]]) -> dict[str, Any]:
    rows = {name: [torch.tensor(item[name]) for item in items] for name in ("input_ids", "labels")}
    pad = nn.utils.rnn.pad_sequence
    ids_BT = pad(rows["input_ids"], batch_first=True)
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    return {
        "input_ids": ids_BT,
        "labels": pad(rows["labels"], batch_first=True, padding_value=IGNORE),
        "attention_mask": (torch.arange(ids_BT.shape[1]) < lengths[:, None]).long(),
        **vision(items, ids_BT),
    }


def vision(items: list[dict[str, Any]], ids_BT: Tensor) -> dict[str, Tensor]:
    seen = [item for item in items if item.get("pixels") is not None]
    if not seen:
        return {}
    return {
        "pixel_values": torch.cat([item["pixels"] for item in seen]),
        "image_grid_thw": torch.tensor([item["grid"] for item in seen]),
        "mm_token_type_ids": (ids_BT == IMAGE_TOKEN).int(),
    }


def flattened(**options: Any) -> Collate:
    return DataCollatorWithFlattening(return_tensors="pt", **options)


def joined_pictures(model: Any) -> Collate:
    """As trainers of Qwen-VL pack: positions [4, 1, T], the text's first."""

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [{name: item[name] for name in ("input_ids", "labels")} for item in items]
        batch = flattened(return_flash_attn_kwargs=True, return_seq_idx=True)(texts)
        axes = []
        for item in items:
            ids_1S = torch.tensor([item["input_ids"]])
            one = vision([item], ids_1S)
            types = {"mm_token_type_ids": (ids_1S == IMAGE_TOKEN).int()}
            found, _ = model.model.get_rope_index(
                ids_1S, image_grid_thw=one.get("image_grid_thw"), **types
            )
            axes.append(found)
        text_11T = batch["position_ids"][None]
        batch["position_ids"] = torch.cat([text_11T, torch.cat(axes, dim=2)])
        return {**batch, **vision(items, batch["input_ids"])}

    return collate


def stored(data: Keyed) -> RandomReference:
    """Made-up losses of the teacher."""
    collate = KeyedCollate(padded)
    return RandomReference(index_of(collate([data[n]]).tokens for n in range(len(data))))


class Step:
    """One step on two micro-batches: what was kept of each sample, losses and gradients."""

    def __init__(self, model: nn.Module, items: list[Any], collate: Collate, **knobs: Any) -> None:
        knobs = {"warmup": 0, "final_dense_share": 0.0, "keep_share": 0.5, **knobs}
        data = Keyed(items, "mine")
        regate = attach(model, config_of(**knobs), total_steps=4, reference=stored(data))
        wrapped = regate.collate(collate)
        micro = [wrapped([data[n] for n in numbers]) for numbers in ((0, 1, 2), (3,))]
        (window,) = regate.windows(micro, Loop(accumulation=2))
        for batch in window:
            regate.loss(model(**batch)).backward()
        self.gradients = gradients(model)
        self.plan, self.micro = regate.plan, micro
        regate.step(applied=True)
        self.counts = {
            name: value
            for name, value in regate.metrics().items()
            if name.endswith(("_total", "_kept"))
        }

    @property
    def kept(self) -> dict[Any, list[int]]:
        """The positions kept of each sample, counted from its first."""
        found = {}
        for batch, plan in zip(self.micro, self.plan.micro, strict=True):
            number_BT = batch.tokens.sample_BT
            kept = torch.zeros(number_BT.numel(), dtype=torch.bool)
            kept[plan.position_R] = True
            for number, key in enumerate(batch.tokens.flat_keys):
                found[key] = kept[(number_BT == number).flatten()].nonzero()[:, 0].tolist()
        return found


def assert_same_step(found: Step, wanted: Step) -> None:
    assert found.micro[0].tokens.labels_BT.shape[0] == 1
    assert wanted.micro[0].tokens.labels_BT.shape[0] == 3
    assert found.kept == wanted.kept
    assert found.counts == wanted.counts
    assert_gradients_equal(found.gradients, wanted.gradients, 1e-5)


WAYS = {
    "positions": {},
    "positions and bounds": {"return_flash_attn_kwargs": True},
    "all": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    "first labels stay": {"separator_id": 7},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_a_flattening_collate_function_gives_the_step_of_padded_rows(
    way: str, attention: str, warmup: int, monkeypatch: pytest.MonkeyPatch
):
    PlainFlash().install(monkeypatch)
    model = uses_flash(causal_lm()) if attention == "flash" else causal_lm(attention=attention)
    found = Step(model, text_items(), flattened(**WAYS[way]), warmup=warmup)
    assert set(found.micro[0].inputs) == {"input_ids", "position_ids"}
    assert_same_step(found, Step(causal_lm(), text_items(), padded, warmup=warmup))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash"])
@pytest.mark.parametrize("knobs", [{"warmup": 1}, {}, {"images.keep_share": 0.5}])
def test_joined_rows_with_positions_of_several_axes_give_the_step_of_padded_rows(
    attention: str, knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    PlainFlash().install(monkeypatch)
    model = uses_flash(qwen2_vl()) if attention == "flash" else qwen2_vl(attention)
    found = Step(model, picture_items(), joined_pictures(model), **knobs)
    wanted = Step(qwen2_vl(), picture_items(), padded, **knobs)
    assert_same_step(found, wanted)
    kept_images = found.counts["image_kept"] < found.counts["image_total"]
    assert kept_images == ("images.keep_share" in knobs)


@pytest.mark.parametrize("axes", [1, 3])
def test_joined_rows_without_the_texts_positions_first_are_refused(axes: int):
    model = qwen2_vl()

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = joined_pictures(model)(items)
        positions = batch["position_ids"]
        batch["position_ids"] = positions[0] if axes == 1 else positions[1:]
        return batch

    message = "keeps samples apart by" if axes == 1 else r"give \[4, rows, tokens\], the text's"
    with pytest.raises(ValueError, match=message):
        Step(model, picture_items(), collate)


def test_bounds_that_come_after_the_collate_function_are_refused():
    model, items = causal_lm(), Keyed(text_items()[:1], "mine")
    regate = attach(model, config_of(), total_steps=4, reference=stored(items))
    batches = [regate.collate(padded)([items[0]])]
    ((batch,),) = regate.windows(batches, Loop(accumulation=1))
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q of 2 samples, the plan has one in each"):
        model(**batch, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
