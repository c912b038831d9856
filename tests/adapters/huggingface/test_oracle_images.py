"""Gated multimodal decoders against the per-layer oracle in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from regate_ds.algorithm.batch import IMAGE
from regate_ds.algorithm.executions.elide_images import ElideImages
from regate_ds.algorithm.executions.execution import Ranked
from regate_ds.algorithm.rows import RowLayout
from regate_ds.families.numbering import numbering_of
from tests.adapters.huggingface.gated_cases_helper import (
    Case,
    assert_exact,
    embed_llava,
    llava_case,
    put_images,
)
from tests.support.models import IMAGE_TOKEN, llava, qwen2_vl, random_batch, with_images
from tests.support.oracle import Rotary


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("gated", [range(0, 3), range(1, 3), range(0, 2), range(2, 3)])
@pytest.mark.parametrize(
    ("rows", "num_images", "image_share"),
    [
        ([[20], [13]], [1, 1], 1.0),
        ([[20], [13]], [2, 0], 0.5),
        ([[16, 7], [13]], [2, 1], 0.3),
        ([[9]], [0], 0.5),
    ],
)
def test_llava_is_exact_with_images_without_and_packed(
    attention, gated, rows, num_images, image_share
):
    case = llava_case(rows, num_images, image_share=image_share)
    assert elides_images(case) == (image_share < 1.0 and sum(num_images) > 0)
    assert_exact(llava(attention), case, gated, embed=embed_llava)


def elides_images(case: Case) -> bool:
    return not set((case.batch.kind_BT == IMAGE).flatten().nonzero().flatten().tolist()) <= set(
        case.plan.position_R.tolist()
    )


PATCH_GRIDS = [(1, 4, 6), (2, 4, 4)]
"""Temporal steps, height and width of each row's image or clip; 2 x 2 patches make a token."""


def qwen2_vl_case(
    lengths: list[int], grids: list[tuple[int, int, int]], image_share: float = 1.0, seed: int = 4
) -> Case:
    input_ids, batch = random_batch([[n] for n in lengths], seed=seed)
    batch = with_images(input_ids, batch, [[h * w // 4] * t for t, h, w in grids])
    case = Case.of(input_ids, batch, seed=seed, image_share=image_share)
    num_patches = sum(t * h * w for t, h, w in grids)
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "pixel_values": torch.randn(num_patches, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": (input_ids == IMAGE_TOKEN).int(),
    }
    return replace(case, inputs=inputs)


def embed_qwen2_vl(host: nn.Module, case: Case) -> Tensor:
    pixels, grid = case.inputs["pixel_values"].double(), case.inputs["image_grid_thw"]
    features = host.model.get_image_features(pixels, grid, return_dict=True).pooler_output
    return put_images(host.get_input_embeddings()(case.input_ids), case, torch.cat(tuple(features)))


def grid_positions(length: int, grid: tuple[int, int, int]) -> Tensor:
    """[3, T]: time, row and column count on from the text before; text counts on from the image.

    The image starts at position 1, as ``with_images`` puts it.
    """
    steps, height, width = (grid[0], grid[1] // 2, grid[2] // 2)
    image = [
        (1 + t, 1 + y, 1 + x) for t in range(steps) for y in range(height) for x in range(width)
    ]
    after = 1 + max(height, width)
    text = [(after + i,) * 3 for i in range(length - 1 - len(image))]
    return torch.tensor([(0, 0, 0), *image, *text]).T


def rotary_of(model: nn.Module, lengths: list[int], grids: list[tuple]) -> list[Rotary]:
    """Each row's cos and sin [T, D] by the host's own table, in fp64."""
    tables = []
    for length, grid in zip(lengths, grids, strict=True):
        positions = grid_positions(length, grid)[:, None]
        like = torch.zeros(1, dtype=torch.float64)
        found = model.model.language_model.rotary_emb(like, positions)
        tables.append(tuple(_joined(one)[0] for one in found))
    return tables


def _joined(table: Tensor) -> Tensor:
    """One table [1, T, D]: older transformers gives one for each axis, which its layers join."""
    if table.dim() == 3:
        return table
    parts = table.split([1, 1, 2] * 2, dim=-1)
    return torch.cat([part[axis % 3] for axis, part in enumerate(parts)], dim=-1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("gated", "image_share"),
    [(range(0, 3), 0.5), (range(1, 3), 0.3), (range(2, 3), 0.5), (range(0, 1), 1.0)],
)
def test_qwen2_vl_is_exact_with_positions_of_three_axes(
    attention: str, gated: range, image_share: float
):
    model, lengths = qwen2_vl(attention), [20, 15]
    rotary_B = rotary_of(model, lengths, PATCH_GRIDS)
    case = qwen2_vl_case(lengths, PATCH_GRIDS, image_share)
    assert elides_images(case) == (image_share < 1.0)
    number_images = numbering_of(model, elides_images=True)
    assert torch.equal(
        number_images({"input_ids": case.input_ids, **case.inputs}), case.batch.image_BT
    )
    assert_exact(model, case, gated, embed=embed_qwen2_vl, rotary_B=rotary_B)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_answers_without_a_loss_are_read_by_the_others(attention: str):
    case = llava_case([[28], [13], [17]], [2, 0, 1])
    is_hard_N = torch.arange(int(case.batch.is_label_BT.sum())) % 3 == 0
    ranked = Ranked(
        score_BT=case.batch.at_labels(is_hard_N.double()),
        num_hard_S=torch.tensor([4, 1, 2]),
        beyond_BT=torch.arange(28).expand(3, -1) % 4 - 2,
    )
    plan = ElideImages().plan(case.batch, ranked, RowLayout())
    assert 0 < plan.num_targets < int(case.batch.is_label_BT.sum())
    assert plan.num_kept < int((case.batch.segment_BT >= 0).sum())
    model = llava(attention=attention)
    assert_exact(model, replace(case, plan=plan), range(1, 3), embed=embed_llava)
