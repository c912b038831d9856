"""What two ranks are given in a step: students and micro-batches of very different sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from regate_ds.config import RegateConfig
from regate_ds.data.collate import Batch
from tests.support.models import (
    IMAGE_TOKEN,
    causal_lm,
    llava,
    packed_positions,
    qwen2_vl,
    random_batch,
    with_images,
)
from tests.support.planning import config_of

RANKS = (0, 1)


@dataclass(frozen=True)
class ZeroCase:
    """One optimizer step of both ranks. Rank 0 sees images, rank 1 none."""

    family: str = "llava"
    stage: int = 0
    accumulation: int = 1
    rows: tuple[Any, Any] = (((24,), (17,)), ((6,),))
    """Lengths of the samples in each row, for each rank."""

    sees: tuple[tuple[str, str], ...] = ()
    """What each rank sees in each micro-batch: "i" images, "v" videos, "iv" an image in the first
    row and videos in the others, "" neither. None given: rank 0 images, rank 1 neither."""

    targets_of_last_rank: int | None = None
    """How many targets every micro-batch of rank 1 keeps, where that is the point of the case."""

    recompute: bool = False
    own_loss: bool = False
    """The user weighs the per-token losses, instead of taking our sum."""

    knobs: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.family}, ZeRO-{self.stage}, accumulation {self.accumulation}"

    @property
    def config(self) -> RegateConfig:
        return config_of(**{"warmup": 0, "final_dense_share": 0.0, **dict(self.knobs)})

    def model(self) -> nn.Module:
        model = FAMILIES[self.family]()
        model.config.video_token_id = VIDEO_TOKEN
        if self.recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def batches(self, rank: int) -> list[Batch]:
        """The rank's micro-batches of the step."""
        return [self._batch(rank, number) for number in range(self.accumulation)]

    def _batch(self, rank: int, number: int) -> Batch:
        rows = [list(row) for row in self.rows[rank]]
        ids, tokens = random_batch(rows, seed=10 * rank + number)
        kinds = self.sees[number][rank] if self.sees else ("i" if rank == 0 else "")
        size = NUM_PLACEHOLDERS[self.family] * bool(kinds)
        images = [[size] * _num_images(self.family, row) for row in range(len(rows)) if size]
        tokens = with_images(ids, tokens, images)
        keys = tuple(
            tuple((f"rank{rank}-{number}", i) for _, i in row_keys) for row_keys in tokens.keys
        )
        inputs: dict[str, Any] = {"input_ids": ids}
        if any(len(row) > 1 for row in rows):
            inputs["position_ids"] = packed_positions(tokens)
        if size:
            inputs |= _pixels(self.family, ids, sum(map(len, images)), seed=number)
        if "v" in kinds:
            inputs = _with_videos(inputs, num_images=int("i" in kinds))
        return Batch(inputs, replace(tokens, keys=keys))


def llava_with_lora() -> nn.Module:
    """Adapters on the decoder; tower and head frozen, the projector trained."""
    torch.manual_seed(5)
    targets = r".*language_model.*(q_proj|v_proj|down_proj)"
    config = LoraConfig(r=4, target_modules=targets, modules_to_save=["multi_modal_projector"])
    model = get_peft_model(llava(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return model.train()


FAMILIES = {
    "llava": llava,
    "llava with LoRA": llava_with_lora,
    "qwen2_vl": qwen2_vl,
    "text": causal_lm,
    "tied text": partial(causal_lm, tie_word_embeddings=True),
}
VIDEO_TOKEN = 59
"""Placeholder of videos: a word, but for micro-batches with videos."""

NUM_PLACEHOLDERS = {"llava": 4, "llava with LoRA": 4, "qwen2_vl": 6, "text": 0, "tied text": 0}
"""Tokens of an image; 0 for students without eyes."""


def _num_images(family: str, row: int) -> int:
    """One, then two that touch; Qwen2-VL's own positions take images that touch for one."""
    return 1 if family == "qwen2_vl" else 1 + row % 2


def _pixels(
    family: str, ids_BT: torch.Tensor, num_images: int, seed: int
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if family != "qwen2_vl":
        return {"pixel_values": torch.randn(num_images, 3, 16, 16, generator=generator)}
    return {
        "pixel_values": torch.randn(num_images * 24, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 6]] * num_images),
        "mm_token_type_ids": (ids_BT == IMAGE_TOKEN).int(),
    }


def _with_videos(inputs: dict[str, Any], num_images: int) -> dict[str, Any]:
    """Make videos of Qwen2-VL's images, which are one a row, but the first ``num_images``."""
    is_video_BT = (inputs["input_ids"] == IMAGE_TOKEN).index_fill(
        0, torch.arange(num_images), False
    )
    ids_BT = inputs["input_ids"].clamp(max=VIDEO_TOKEN - 1)
    ids_BT[inputs["input_ids"] == IMAGE_TOKEN] = IMAGE_TOKEN
    ids_BT[is_video_BT] = VIDEO_TOKEN
    found = {
        "input_ids": ids_BT,
        "mm_token_type_ids": inputs["mm_token_type_ids"].masked_fill(is_video_BT, 2),
        "pixel_values_videos": inputs["pixel_values"][num_images * 24 :],
        "video_grid_thw": inputs["image_grid_thw"][num_images:],
    }
    if num_images:
        found["pixel_values"] = inputs["pixel_values"][: num_images * 24]
        found["image_grid_thw"] = inputs["image_grid_thw"][:num_images]
    return {**{k: x for k, x in inputs.items() if not k.startswith(("pixel", "image"))}, **found}


SEES = (("iv", "i"), ("iv", ""), ("i", "v"), ("", ""), ("v", "iv"))
"""As the two ranks, each of two rows, see them in a step."""

BY_WINDOW = (("score", "random"), ("quota", "per_window"), ("per_window.floor", 0.2))


IMAGES_ELIDED = (("images.keep_share", 0.5),)
IMAGES_ALONE = (*IMAGES_ELIDED, ("execution", "elide_images"))
ENTROPY = (("score", "entropy"),)
MERGED = (("merge.steps", 2),)
AFTER_FORWARD = (*ENTROPY, ("execution", "after_forward"))
MLP_ONLY = (*IMAGES_ELIDED, ("execution", "mlp_only"), ("token_multiple", 8))
RANDOM_LTD = (("execution", "random_ltd"), ("score", "random"), ("last_layer", 2))
BACKWARD_ONLY = (*IMAGES_ELIDED, ("execution", "backward_only"), ("token_multiple", 8))


def cases() -> Iterator[tuple[str, ZeroCase]]:
    """(what is special, case)"""
    for stage in (0, 1, 2, 3):
        yield "uneven ranks", ZeroCase(stage=stage)
        yield "images elided", ZeroCase(stage=stage, accumulation=3, knobs=IMAGES_ELIDED)
    lonely = ZeroCase(rows=(((24,), (17,)), ((4,),)), targets_of_last_rank=1)
    silent = ZeroCase(rows=(((24,), (17,)), ((2,),)), targets_of_last_rank=0)
    for stage in (1, 2, 3):
        yield "a single kept target", replace(lonely, stage=stage, accumulation=1)
        yield "no target on a rank", replace(silent, stage=stage)
        yield "three axes", ZeroCase("qwen2_vl", stage, knobs=IMAGES_ELIDED)
    for stage in (2, 3):
        yield "adapters", ZeroCase("llava with LoRA", stage, 3, knobs=ENTROPY)
        yield "tied head", ZeroCase("tied text", stage)
        packed = (((14, 9), (17,)), ((6, 5, 3),))
        yield "packed rows", ZeroCase(stage=stage, rows=packed, knobs=IMAGES_ELIDED)
        yield "a range in the middle", ZeroCase(stage=stage, knobs=(("last_layer", 2),))
        yield "a dense step", ZeroCase(stage=stage, accumulation=3, knobs=(("warmup", 1),))
        yield "own loss", ZeroCase(stage=stage, accumulation=3, own_loss=True, knobs=ENTROPY)
        yield "loss only", ZeroCase(stage=stage, knobs=(("execution", "loss_only"),))
        yield "images alone", ZeroCase(stage=stage, accumulation=3, knobs=IMAGES_ALONE)
        yield "by window", ZeroCase(stage=stage, accumulation=3, knobs=BY_WINDOW)
        recompute = ZeroCase(stage=stage, accumulation=3, recompute=True, knobs=IMAGES_ELIDED)
        yield "recompute", recompute
        yield "MLP only, recompute", replace(recompute, knobs=MLP_ONLY)
        yield "backward only, recompute", replace(recompute, knobs=BACKWARD_ONLY)
        yield "random LTD", ZeroCase(stage=stage, accumulation=3, knobs=RANDOM_LTD)
        yield "backward only", ZeroCase("qwen2_vl", stage, knobs=BACKWARD_ONLY)
        yield "merged, recompute", replace(recompute, knobs=MERGED)

        if stage == 3:
            yield "after forward", ZeroCase(stage=stage, accumulation=3, knobs=AFTER_FORWARD)
            rows = (((24,), (17,)), ((19,), (12,)))
            mixed = ZeroCase("qwen2_vl", stage, len(SEES), rows, sees=SEES, recompute=True)
            yield "images and videos", replace(mixed, knobs=IMAGES_ELIDED)


CASES = {f"{what}: {case.name}": case for what, case in cases()}
