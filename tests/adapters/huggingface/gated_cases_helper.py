"""Micro-batches with plans, and one statement of how exact the gated decoder has to be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.plan import ElisionPlan, plan_dense
from regate_ds.images_config import ImagesConfig
from tests.support.batches import made_up_images
from tests.support.measure import Gradients, assert_gradients_equal, gradients, relative_error
from tests.support.models import IMAGE_TOKEN, packed_positions, random_batch, with_images
from tests.support.oracle import Rotary, oracle_loss
from tests.support.planning import gate_layers, plan_sparse

TOLERANCE = 5e-6
LOSS_TOLERANCE = 1e-6

FLOOR = 2e-7
"""A dense run may hit the exact gradient by luck: allow about two units in the last place of fp32
before comparing with it."""

TOKENS_OF_LLAVA_IMAGE = 4


@dataclass(frozen=True)
class Case:
    """A micro-batch, its plan, and what else the model is called with."""

    input_ids: Tensor
    batch: TokenBatch
    plan: ElisionPlan
    inputs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        batch: TokenBatch,
        *,
        seed: int = 0,
        image_share: float = 1.0,
        **knobs: Any,
    ) -> Case:
        """Scores at random; half of the label positions kept unless ``knobs`` say otherwise."""
        if image_share < 1.0:
            knobs["images"] = ImagesConfig(keep_share=image_share)
        generator = torch.Generator().manual_seed(seed)
        score_N = torch.rand(int(batch.is_label_BT.sum()), generator=generator)
        plan = plan_sparse(batch, score_N, **{"keep_share": 0.5, "align": "predictor", **knobs})
        inputs = {"position_ids": packed_positions(batch)} if plan.is_packed else {}
        return cls(input_ids, batch, plan, inputs)

    @property
    def dense(self) -> Case:
        return replace(self, plan=plan_dense(self.batch))

    def run(self, model: nn.Module) -> Any:
        return model(input_ids=self.input_ids, regate_plan=self.plan, **self.inputs)


def text_case(rows: list[list[int]], *, seed: int = 1, **knobs: Any) -> Case:
    """Text; images are made up, at places where any token may lie."""
    input_ids, batch = random_batch(rows, seed=seed)
    return Case.of(input_ids, made_up_images(batch), seed=seed, **knobs)


def llava_case(rows: list[list[int]], num_images: list[int], seed: int = 2, **knobs) -> Case:
    """Images at the start of the rows that have any, one after the other."""
    input_ids, batch = random_batch(rows, seed=seed)
    batch = with_images(input_ids, batch, [[TOKENS_OF_LLAVA_IMAGE] * n for n in num_images])
    case = Case.of(input_ids, batch, seed=seed, **knobs)
    if not sum(num_images):
        return case
    pixels = torch.randn(sum(num_images), 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return replace(case, inputs={**case.inputs, "pixel_values": pixels})


Embed = Callable[[nn.Module, Case], Tensor]
"""(host in fp64, case) -> what the host's decoder reads, [B, T, H]."""


def embed_text(host: nn.Module, case: Case) -> Tensor:
    return host.get_input_embeddings()(case.input_ids)


def embed_llava(host: nn.Module, case: Case) -> Tensor:
    embedded = host.get_input_embeddings()(case.input_ids)
    if "pixel_values" not in case.inputs:
        return embedded
    pixels = case.inputs["pixel_values"].double()
    features = host.model.get_image_features(pixels, return_dict=True).pooler_output
    return put_images(embedded, case, torch.cat(tuple(features)))


def put_images(embedded: Tensor, case: Case, features: Tensor) -> Tensor:
    return embedded.masked_scatter((case.input_ids == IMAGE_TOKEN)[..., None], features)


def exact_run(
    model: nn.Module,
    case: Case,
    gated: range,
    *,
    embed: Embed = embed_text,
    rotary_B: list[Rotary] | None = None,
) -> tuple[float, Gradients]:
    """Loss and gradients of the per-layer oracle, in fp64 on the same weights."""
    exact = copy.deepcopy(model).double()
    base = exact.get_base_model() if hasattr(exact, "get_base_model") else exact
    loss = oracle_loss(base, embed(base, case), case.batch, case.plan, gated, rotary_B)
    loss.backward()
    return loss.item(), gradients(exact)


def fast_run(model: nn.Module, case: Case, gated: range) -> tuple[float, Gradients]:
    """The same by the attached model, in the model's own precision."""
    attached = copy.deepcopy(model)
    gate_layers(attached, first_layer=gated.start, last_layer=gated.stop)
    loss = case.run(attached).loss_sum
    loss.backward()
    return loss.item(), gradients(attached)


def assert_exact(model: nn.Module, case: Case, gated: range, **how: Any) -> None:
    """The measure of exactness: per tensor, in the loss, and against a dense run's rounding.

    A dense fp32 run on the same case is off as well. The sparse run may be off three times as far,
    measured over all gradients together: single tensors are too small a sample of rounding.
    """
    errors = []
    for each in (case, case.dense):
        wanted_loss, wanted = exact_run(model, each, gated, **how)
        found_loss, found = fast_run(model, each, gated)
        assert abs(found_loss - wanted_loss) <= LOSS_TOLERANCE * abs(wanted_loss)
        assert_gradients_equal(found, wanted, TOLERANCE)
        errors.append(relative_error(found, wanted))
    sparse_error, dense_error = errors
    assert sparse_error <= max(3 * dense_error, FLOOR), (sparse_error, dense_error)


TWO_MICRO_BATCHES = [
    text_case([[20], [13]], seed=1),
    text_case([[8, 9], [25]], seed=2, image_share=0.5),
]


def run_together(model: nn.Module, cases: list[Case]) -> Gradients:
    """All forward passes before the one backward pass."""
    sum(case.run(model).loss_sum for case in cases).backward()
    return gradients(model)


def assert_same_bits(found: Gradients, wanted: Gradients) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
