"""Micro-batches of a family: images and text together, text alone, and each of them packed.

Shapes: B rows, T positions, K slots, N label positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.algorithm.batch import IGNORE, TokenBatch
from regate_ds.algorithm.executions.execution import Ranked
from regate_ds.algorithm.executions.random_ltd import RandomLtd
from regate_ds.algorithm.plan import ElisionPlan, plan_rows, with_all_labels
from regate_ds.algorithm.rows import RowLayout
from regate_ds.images_config import ImagesConfig
from tests.families.zoo.models.family import Family
from tests.families.zoo.models.sizes import AFTER, BEFORE, END, IMAGE_TOKEN, PADDING, START
from tests.support.models import packed_positions
from tests.support.planning import plan_sparse

FIRST_WORD, LAST_WORD = 10, 80

PLANS = ("answers", "answers and images", "all kept")
"""What a plan elides; the last keeps everything, but moves rows as a sparse plan does."""


@dataclass(frozen=True)
class Case:
    """A micro-batch, as the host's forward takes it and as the planner does."""

    name: str
    inputs: dict[str, Any]
    batch: TokenBatch

    def plans(self) -> Iterator[tuple[str, ElisionPlan]]:
        """Yield each plan by its name in PLANS; a text has no images to elide."""
        for name in PLANS:
            if name == "answers and images" and self.batch.image_BT is None:
                continue
            yield name, self.plan(name)

    def plan(self, name: str, seed: int = 0) -> ElisionPlan:
        """Return the plan of that name; half of the labels, and of each image, are kept."""
        if name == "all kept":
            num_rows, num_tokens = self.batch.labels_BT.shape
            return plan_rows(self.batch, torch.arange(num_tokens).expand(num_rows, -1))
        generator = torch.Generator().manual_seed(seed)
        score_N = torch.rand(int(self.batch.is_label_BT.sum()), generator=generator)
        images = ImagesConfig(keep_share=0.5) if name == "answers and images" else None
        return plan_sparse(self.batch, score_N, keep_share=0.5, align="predictor", images=images)

    def plan_of(self, execution: str, plan: ElisionPlan, gated: range) -> ElisionPlan:
        """Return what the execution makes of a plan: on all labels, or with draws of each layer."""
        if execution == "backward_only":
            return with_all_labels(plan, self.batch)
        if execution != "random_ltd":
            return plan
        share = plan.num_kept / int((self.batch.segment_BT >= 0).sum())
        ranked = Ranked(
            score_BT=torch.zeros(self.batch.labels_BT.shape),
            num_hard_S=torch.zeros(len(self.batch.flat_keys), dtype=torch.int64),
            keep_share=min(1.0, share),
            layers=gated,
        )
        return RandomLtd().plan(self.batch, ranked, RowLayout())


@dataclass(frozen=True)
class _Row:
    """One row's tokens, in which an image is its number, and each token's sample."""

    ids: list[int]
    image: list[int]
    is_answer: list[bool]
    segment: list[int]


def cases_of(family: Family, host: nn.Module) -> list[Case]:
    """Return the family's micro-batches; the host says how many tokens each image has."""
    generator = torch.Generator().manual_seed(1)
    cases = []
    if family.make_images is not None:
        cases.append(_images(family, host, generator))
    cases.append(_text(family, generator))
    cases.append(_packed(family, generator))
    if family.make_images is not None:
        cases.append(_packed_images(family, host, generator))
    return cases


def _images(family: Family, host: nn.Module, generator: torch.Generator) -> Case:
    """Two images in the first row, none in the second, one in the third."""
    made, (first, second, third) = _three_images(family, host, generator)
    answers = family.settings.get("answers", (7, 6))
    rows = [
        row_of([[first, second]], [answers], generator),
        row_of([[]], [(9, 8)], generator),
        row_of([[third]], [(6, 4)], generator),
    ]
    inputs, batch = joined(family, rows)
    if not family.settings.get("mask_never", False):
        inputs["attention_mask"] = (batch.segment_BT >= 0).long()
    return Case("images", {**inputs, **made}, batch)


def _text(family: Family, generator: torch.Generator) -> Case:
    """Rows of different length, without a mask unless the family needs one."""
    rows = [row_of([[]], [size], generator) for size in ((8, 9), (5, 3), (9, 5))]
    inputs, batch = joined(family, rows)
    if family.settings.get("mask_always", False):
        inputs["attention_mask"] = (batch.segment_BT >= 0).long()
    return Case("text", inputs, batch)


def _packed(family: Family, generator: torch.Generator) -> Case:
    """Several samples a row, whose positions restart."""
    rows = [
        row_of([[], []], [(6, 4), (5, 5)], generator),
        row_of([[], [], []], [(3, 3), (4, 3), (2, 3)], generator),
    ]
    inputs, batch = joined(family, rows)
    return Case("packed", {**inputs, **_restarting(family, batch)}, batch)


def _packed_images(family: Family, host: nn.Module, generator: torch.Generator) -> Case:
    """The same with images: in both samples of a row, in none, and in the second alone."""
    made, (first, second, third) = _three_images(family, host, generator)
    rows = [
        row_of([[first], [second]], [(4, 3), (5, 3)], generator),
        row_of([[], []], [(6, 4), (3, 3)], generator),
        row_of([[], [third]], [(5, 3), (4, 4)], generator),
    ]
    inputs, batch = joined(family, rows)
    return Case("packed images", {**inputs, **_restarting(family, batch), **made}, batch)


def _three_images(
    family: Family, host: nn.Module, generator: torch.Generator
) -> tuple[dict[str, Any], list[int]]:
    """Return the inputs of three images, and how many tokens each has."""
    assert family.make_images is not None
    made = family.make_images(host, generator, 3)
    return made, (family.count_tokens or tokens_of_features)(host, made)


def _restarting(family: Family, batch: TokenBatch) -> dict[str, Tensor]:
    """Return positions that restart in each sample, on all axes of the host."""
    positions = packed_positions(batch)
    axes = family.settings.get("position_axes", 1)
    return {"position_ids": positions if axes == 1 else positions.expand(axes + 1, -1, -1)}


def row_of(
    images: list[list[int]], answers: list[tuple[int, int]], generator: torch.Generator
) -> _Row:
    """Join samples: a start, images of so many tokens, and two turns with answers so long."""
    row = _Row([], [], [], [])
    for sample, (sizes, lengths) in enumerate(zip(images, answers)):
        before = len(row.ids)
        _extend(row, [START])
        for number, size in enumerate(sizes):
            _extend(row, [BEFORE])
            _extend(row, [IMAGE_TOKEN] * size, image=number)
            _extend(row, [AFTER])
        for length in lengths:
            _extend(row, _words(3, generator))
            _extend(row, [*_words(length - 1, generator), END], is_answer=True)
        row.segment.extend([sample] * (len(row.ids) - before))
    return row


def _extend(row: _Row, ids: list[int], *, image: int = -1, is_answer: bool = False) -> None:
    row.ids.extend(ids)
    row.image.extend([image] * len(ids))
    row.is_answer.extend([is_answer] * len(ids))


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(FIRST_WORD, LAST_WORD, (count,), generator=generator).tolist()


def joined(family: Family, rows: list[_Row]) -> tuple[dict[str, Any], TokenBatch]:
    """Pad the rows at their ends; a label stands where its token is predicted."""
    ids_BT = _padded([row.ids for row in rows], PADDING)
    image_BT = _padded([row.image for row in rows], -1)
    answer_BT = _padded([[int(one) for one in row.is_answer] for row in rows], 0).bool()
    segment_BT = _padded([row.segment for row in rows], -1)
    labels_BT = torch.where(answer_BT, ids_BT, IGNORE).roll(-1, 1)
    labels_BT[:, -1] = IGNORE
    keys = _keys([max(row.segment) + 1 for row in rows])
    has_images = bool((image_BT >= 0).any())
    batch = TokenBatch(keys, segment_BT, labels_BT, image_BT if has_images else None)
    mark = family.extra_inputs
    extra = {} if mark is None else mark(image_BT, answer_BT, segment_BT)
    return {"input_ids": ids_BT, **extra}, batch


def _padded(rows: list[list[int]], value: int) -> Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def _keys(num_samples: list[int]) -> tuple[Any, ...]:
    return tuple(
        tuple(("set", 10 * row + sample) for sample in range(count))
        for row, count in enumerate(num_samples)
    )


@torch.no_grad()
def tokens_of_features(host: Any, images: dict[str, Any]) -> list[int]:
    """Return the number of features of each image, by the host's own tower.

    Where the host joins the images' features, each has a share as large as its grid.
    """
    asked = host if hasattr(host, "get_image_features") else host.model
    features = asked.get_image_features(**images, return_dict=True).pooler_output
    if isinstance(features, list | tuple) or features.dim() > 2:
        return [one.reshape(-1, one.shape[-1]).shape[0] for one in features]
    area_I = images["image_grid_thw"].prod(dim=1)
    return (area_I * len(features) // area_I.sum()).tolist()
