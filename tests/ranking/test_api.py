"""Orders of a data set of users' own, and the loop that reads them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from regate_ds import (
    ImageOrderStore,
    ImagesConfig,
    Keyed,
    ReferenceStore,
    RegateConfig,
    attach,
    rank_images,
)
from regate_ds.adapters.window import window_tokens
from regate_ds.algorithm.rankings.attention import AttentionOrder
from regate_ds.algorithm.rankings.diversity import DiversityOrder
from regate_ds.algorithm.rankings.mixed import MixedOrder
from regate_ds.algorithm.rankings.pixels import PixelOrder
from regate_ds.algorithm.rankings.random import RandomOrder
from regate_ds.algorithm.rankings.ranking import Picture, Ranking
from regate_ds.families.pictures import pictures_of
from regate_ds.parallel.layout import ParallelLayout
from regate_ds.schedule_config import ScheduleConfig
from regate_ds.session import Regate
from regate_ds.stores.values import Stores
from regate_ds.teacher.api import Teacher, score_dataset
from tests.support.models import causal_lm
from tests.support.tiny_students import make_image, make_llava, make_qwen2_vl

SIZES = [[(24, 24)], [], [(16, 24), (40, 24)], [(24, 16)]]
"""Width and height of the images of each sample."""

MAKE = {"llava": make_llava, "qwen2_vl": make_qwen2_vl}


class Samples:
    """Items of a data set: images side by side, then a question and an answer."""

    def __init__(self, student: Any) -> None:
        self.student = student

    def __len__(self) -> int:
        return len(SIZES)

    def images(self, number: int) -> list[Any]:
        return [make_image(*size, seed=10 * number + i) for i, size in enumerate(SIZES[number])]

    def __getitem__(self, number: int) -> dict[str, Any]:
        vision, token = self.student.vision, self.student.model.config.image_token_id
        images = self.images(number)
        num_image = sum(vision.num_tokens(image.size) for image in images)
        ids = torch.tensor([0, *[token] * num_image, 4, 5, 6, 7, 8, 9, 1])
        labels = ids.clone()
        labels[: 1 + num_image + 2] = -100
        item = {"input_ids": ids, "labels": labels}
        return item | (vision.pixels(images) if images else {})


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A user's own: right padding, and the images one after the other."""
    pad = {"input_ids": 2, "labels": -100}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence(
            [item[name] for item in items], batch_first=True, padding_value=value
        )
        for name, value in pad.items()
    }
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    for name in ("pixel_values", "image_grid_thw"):
        if parts := [item[name] for item in items if name in item]:
            batch[name] = torch.cat(parts)
    return batch


@pytest.fixture(params=MAKE)
def samples(request) -> Samples:
    return Samples(MAKE[request.param]())


def picture_of(samples: Samples, image: Any, reads: str) -> Picture:
    """One image, run by itself."""
    size, model = samples.student.vision.num_tokens(image.size), samples.student.model
    inputs = samples.student.vision.pixels([image])
    (picture,) = pictures_of(model, inputs, [size], reads)  # type: ignore[arg-type]
    return picture


@pytest.mark.parametrize("ranking", [PixelOrder(), DiversityOrder(), AttentionOrder()])
def test_each_image_has_the_order_that_it_has_alone(samples, ranking, tmp_path):
    data, model = Keyed(samples, "mine"), samples.student.model
    cost = rank_images(data, collate, model, ranking, tmp_path / "store", batch=2)
    store = ImageOrderStore(tmp_path / "store", verify="full")
    store.require_ranking(ranking)
    assert cost.num_pictures == store.num_images == 4
    assert (store.model_id is None) == (ranking.reads == "pixels")
    for number in range(len(SIZES)):
        for i, image in enumerate(samples.images(number)):
            size = samples.student.vision.num_tokens(image.size)
            picture = picture_of(samples, image, ranking.reads)
            half = -(-size // 2)
            (found,) = store.read([(("mine", number), i)], [size])
            assert found[:half].tolist() == ranking.order(picture, half).tolist()
    assert rank_images(data, collate, model, ranking, store.path).num_pictures == 0


def images_config(ranking: Ranking) -> RegateConfig:
    return RegateConfig(
        keep_share=1.0,
        images=ImagesConfig(keep_share=0.4, ranking=ranking),
        schedule=ScheduleConfig(warmup=0, final_dense_share=0.0, cycle_dense_steps=0),
    )


def test_a_session_keeps_the_patches_of_most_variance(samples, tmp_path):
    """Of n tokens ceil(0.4 n), against a sort of each image's patches."""
    config, data = images_config(PixelOrder()), Keyed(samples, "mine")
    rank_images(data, collate, samples.student.model, config.images.ranking, tmp_path / "store")
    orders = ImageOrderStore(tmp_path / "store")
    regate = attach(samples.student.model, config, total_steps=1, orders=orders)
    batch = regate.collate(collate)([data[number] for number in range(len(SIZES))])
    session = Regate(config, Stores(orders=orders), total_steps=1, layout=ParallelLayout())
    plan = session.plan_step(lambda: window_tokens([batch])).micro[0]
    kept = set(plan.position_R.tolist())
    width = batch.inputs["input_ids"].shape[1]
    for number in range(len(SIZES)):
        start = 1
        for image in samples.images(number):
            pixels_nP = picture_of(samples, image, "pixels").pixels_nP
            variance = [float(patch.var(correction=0)) for patch in pixels_nP]
            order = sorted(range(len(variance)), key=lambda token: -variance[token])
            expected = {start + token for token in order[: -(-4 * len(order) // 10)]}
            here = range(start, start + len(order))
            assert {p for p in here if number * width + p in kept} == expected
            start += len(order)
    regate.remove()


def test_attach_refuses_a_run_without_the_orders_that_its_ranking_reads(samples, tmp_path):
    data, model = Keyed(samples, "mine"), samples.student.model
    with pytest.raises(ValueError, match=r"^images.ranking=MixedOrder reads orders .* orders=None"):
        attach(model, images_config(MixedOrder()), total_steps=1)
    rank_images(data, collate, model, PixelOrder(), tmp_path / "store")
    orders = ImageOrderStore(tmp_path / "store")
    with pytest.raises(ValueError, match="were computed for images.ranking pixels, this run has d"):
        attach(model, images_config(MixedOrder()), total_steps=1, orders=orders)
    with pytest.raises(ValueError, match="orders='store' is a str; give an ImageOrderStore"):
        attach(model, RegateConfig(), orders="store")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is a ImageOrderStore; give a ReferenceStore"):
        attach(model, RegateConfig(), reference=orders)  # type: ignore[arg-type]


def test_rank_images_refuses_what_it_cannot_rank(samples, tmp_path):
    data, model = Keyed(samples, "mine"), samples.student.model
    with pytest.raises(ValueError, match="ranking='pixels' is a str; give a ranking"):
        rank_images(data, collate, model, "pixels", tmp_path / "s")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch='2': must be a whole number"):
        rank_images(data, collate, model, PixelOrder(), tmp_path / "s", batch="2")  # type: ignore
    blind = SimpleNamespace(config=SimpleNamespace(model_type="phi4_multimodal"))
    with pytest.raises(ValueError, match="of a SimpleNamespace cannot be ranked, as it has no get"):
        rank_images(data, collate, blind, PixelOrder(), tmp_path / "s")


def test_the_store_is_of_the_data_of_the_teachers_store(samples, tmp_path):
    """So that both can be compared with one answer index."""
    data, token = Keyed(samples, "mine"), samples.student.model.config.image_token_id
    teacher = Teacher(model=causal_lm(), pad_id=2, image_token_id=token)
    score_dataset(data, collate, teacher, tmp_path / "reference")
    rank_images(data, collate, samples.student.model, PixelOrder(), tmp_path / "store")
    fingerprint = ReferenceStore(tmp_path / "reference").fingerprint
    ImageOrderStore(tmp_path / "store").require(fingerprint)


def test_a_ranking_that_needs_no_store_is_refused(samples, tmp_path):
    with pytest.raises(ValueError, match="^images.ranking=RandomOrder needs no store, so there is"):
        rank_images(
            Keyed(samples, "mine"), collate, samples.student.model, RandomOrder(), tmp_path / "s"
        )


def test_a_sample_with_a_video_is_refused_by_name(samples, tmp_path):
    def with_video(items):
        return {**collate(items), "pixel_values_videos": torch.zeros(1)}

    data, model = Keyed(samples, "mine"), samples.student.model
    with pytest.raises(ValueError, match="^sample 'mine' record 0 has pixel_values_videos, which"):
        rank_images(data, with_video, model, PixelOrder(), tmp_path / "store")


def test_the_text_decoder_does_not_name_the_store(samples, tmp_path):
    data, model = Keyed(samples, "mine"), samples.student.model
    rank_images(data, collate, model, DiversityOrder(), tmp_path / "store")
    before = ImageOrderStore(tmp_path / "store").model_id
    assert before.startswith(f"{model.config.model_type}-")
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
        next(model.model.get_decoder().parameters()).add_(1.0)
    assert rank_images(data, collate, model, DiversityOrder(), tmp_path / "store").num_pictures == 0
    with torch.no_grad():
        for name, weight in model.model.named_parameters():
            if not name.startswith("language_model"):
                weight.add_(1.0)
    with pytest.raises(ValueError, match=f"belongs to the model {before}, this job has"):
        rank_images(data, collate, model, DiversityOrder(), tmp_path / "store")
