"""The choice after the forward pass: which positions, their loss and gradients, by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from regate_ds.adapters.huggingface.gates import attach_model
from regate_ds.adapters.torch.attach import attach
from regate_ds.algorithm.executions.after_forward import AfterForward
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.algorithm.scores.entropy import Entropy
from regate_ds.algorithm.scores.excess_loss import ExcessLoss
from regate_ds.algorithm.scores.loss import LastLoss
from regate_ds.algorithm.scores.score import Score
from regate_ds.config import RegateConfig
from regate_ds.schedule_config import ScheduleConfig
from regate_ds.session import Regate
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores
from tests.adapters.deepspeed.test_loop import batches, engine
from tests.adapters.huggingface.gated_cases_helper import Case, text_case
from tests.support.measure import assert_gradients_equal, gradients
from tests.support.models import causal_lm
from tests.support.stores import RandomReference, index_of

SCORES = {"loss": LastLoss(), "entropy": Entropy(), "excess": ExcessLoss(reference="student")}
TOLERANCE = 1e-5


def config_of(score: Score, keep_share: float = 0.3) -> RegateConfig:
    schedule = ScheduleConfig(warmup=0, final_dense_share=0.0)
    return RegateConfig(
        execution=AfterForward(), score=score, keep_share=keep_share, schedule=schedule
    )


def plan_of(config: RegateConfig, case: Case) -> ElisionPlan:
    index = index_of([case.batch])
    columns = {one.name: one.unseen for one in config.statistics}
    stores = Stores(RandomReference(index), DifficultyStore(index, columns=columns))
    (plan,) = Regate(config, stores, total_steps=2).plan_step([case.batch]).micro
    return plan


def host_values(model: nn.Module, case: Case) -> tuple[Tensor, Tensor]:
    """Losses, differentiable, and entropies of the host's own logits at all label positions."""
    logits_BTV = model(input_ids=case.input_ids).logits
    log_NV = logits_BTV[case.batch.is_label_BT].log_softmax(-1)
    labels_N = case.batch.labels_BT[case.batch.is_label_BT]
    losses_N = -log_NV.gather(1, labels_N[:, None])[:, 0]
    return losses_N, -(log_NV.exp() * log_NV).sum(-1).detach()


def best(values: list[float], num: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda n: (-values[n], n))[:num])


@pytest.mark.parametrize("own_loss", [False, True], ids=["our loss", "own loss"])
@pytest.mark.parametrize("name", SCORES)
def test_positions_loss_and_gradients_are_those_of_the_hosts_logits(name: str, own_loss: bool):
    model, case = causal_lm(num_layers=2), text_case([[20], [13]])
    config, host = config_of(SCORES[name]), copy.deepcopy(model)
    plan, (losses_N, entropies_N) = plan_of(config, case), host_values(host, case)
    reference_N = RandomReference(index_of([case.batch])).read(case.batch.flat_keys)
    value_N = {"loss": losses_N, "entropy": entropies_N, "excess": losses_N - reference_N}[name]
    num = math.ceil(0.3 * len(losses_N) - 1e-9)
    assert plan.num_targets == num < len(losses_N)
    chosen = best(value_N.tolist(), num)
    losses_N[chosen].sum().backward()

    attach_model(model, config, own_loss=own_loss)
    output = Case(case.input_ids, case.batch, plan).run(model)
    labels = case.batch.is_label_BT.flatten().nonzero().flatten()
    assert output.plan.label_position_L.tolist() == labels[chosen].tolist()
    assert output.plan.num_targets == len(output.losses) == num
    torch.testing.assert_close(output.losses, losses_N[chosen], rtol=TOLERANCE, atol=TOLERANCE)
    output.loss_sum.backward()
    assert_gradients_equal(gradients(model), gradients(host), TOLERANCE)


def test_the_mean_over_the_kept_is_the_conditional_value_at_risk():
    """By Rockafellar and Uryasev: the least of c + mean(max(loss - c, 0)) / (1 - alpha)."""
    model, case = causal_lm(num_layers=2), text_case([[20], [13]])
    num = int(case.batch.is_label_BT.sum())
    config = config_of(LastLoss(), keep_share=5 / num)
    losses = host_values(model, case)[0].tolist()
    risks = [c + sum(max(x - c, 0) for x in losses) / num / (5 / num) for c in losses]
    plan = plan_of(config, case)
    attach_model(model, config)
    output = Case(case.input_ids, case.batch, plan).run(model)
    assert float(output.loss_sum.detach()) / 5 == pytest.approx(min(risks), rel=1e-5)


def test_a_loop_divides_by_the_numbers_chosen_and_remembers_the_chosen_alone():
    loader, model = batches(), causal_lm(num_layers=2)
    regate = attach(model, config_of(LastLoss(), keep_share=0.3), total_steps=4)
    windows = regate.windows(loader * 2, engine())
    window, outputs = next(windows), []
    for inputs in window:
        outputs.append(model(**inputs))
        regate.loss(outputs[-1])
    counts = [math.ceil(0.3 * int(b.tokens.is_label_BT.sum()) - 1e-9) for b in loader]
    metrics = regate.metrics()
    assert [one.plan.num_targets for one in outputs] == counts
    assert metrics["answer_kept"] == regate.plan.num_targets_global == sum(counts)
    assert metrics["tokens_kept"] == metrics["tokens_total"]
    assert not metrics["dense"]
    # Three micro-batches, by which the engine divides what it is given.
    assert regate._scale() == pytest.approx(3 / sum(counts))
    regate.step(applied=True)
    store = regate._opened.difficulty
    for batch, output in zip(loader, outputs, strict=True):
        wanted_P = torch.full((batch.tokens.labels_BT.numel(),), torch.inf)
        wanted_P[output.plan.label_position_L] = output.losses
        found_N = store.read(batch.tokens.flat_keys)["loss"]
        assert torch.equal(found_N, wanted_P[batch.tokens.is_label_BT.flatten()])
    # What is remembered does not enter the choice: the same weights choose the same again.
    for inputs, before in zip(next(windows), outputs, strict=True):
        again = model(**inputs)
        assert torch.equal(again.plan.label_position_L, before.plan.label_position_L)
