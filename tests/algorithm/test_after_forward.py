"""The choice after the forward pass: numbers before it, ties, and what does not go with it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from regate_ds.algorithm.executions.after_forward import AfterForward, chosen_targets, narrowed
from regate_ds.algorithm.executions.execution import Ranked
from regate_ds.algorithm.executions.table import require_execution
from regate_ds.algorithm.quotas.threshold import Threshold
from regate_ds.algorithm.rows import RowLayout
from regate_ds.algorithm.scores.excess_loss import ExcessLoss
from regate_ds.algorithm.scores.fused import Fused
from regate_ds.algorithm.scores.gain import Gain
from regate_ds.algorithm.scores.loss import LastLoss
from regate_ds.algorithm.scores.random import Random
from regate_ds.config import RegateConfig
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.learning.words_kept import WordsKept
from regate_ds.recipe.reports.sample import picture_sample
from regate_ds.session import Regate
from regate_ds.stores.values import Stores
from tests.algorithm.plain_plan_helper import wild_batch
from tests.support.batches import random_batch


def planned(batch, keep_share: float):
    score_BT = torch.zeros(batch.labels_BT.shape, dtype=torch.float64)
    reference_BT = torch.rand(batch.labels_BT.shape)
    ranked = Ranked(
        score_BT=score_BT,
        num_hard_S=torch.zeros(len(batch.flat_keys), dtype=torch.int64),
        keep_share=keep_share,
        reference_BT=reference_BT,
    )
    return AfterForward().plan(batch, ranked, RowLayout()), reference_BT


def test_of_n_positions_the_share_rounded_up_is_chosen_by_loss_less_reference():
    rng = random.Random(7)
    for _ in range(40):
        batch, share = wild_batch(rng), rng.choice([0.1, 0.3, 0.5, 1.0])
        plan, reference_BT = planned(batch, share)
        num = int(batch.is_label_BT.sum())
        # In tenths, so that the count is exact without a float.
        assert plan.num_targets == -(-num * round(10 * share) // 10)
        assert len(plan.targets_L) == num
        # Some losses are equal: the earlier position wins.
        losses_L = torch.randint(0, 3, (num,)).float()
        reference_L = reference_BT[batch.is_label_BT]
        for score, value_L in (
            (LastLoss(), losses_L),
            (ExcessLoss(), losses_L - reference_L),
        ):
            values = value_L.tolist()
            order = sorted(range(num), key=lambda n: (-values[n], n))
            wanted = sorted(order[: plan.num_targets])
            chosen_C = chosen_targets(score, plan, {"loss": losses_L})
            assert chosen_C.tolist() == wanted
            after = narrowed(plan, chosen_C)
            assert after.num_targets == len(wanted)
            positions = batch.is_label_BT.flatten().nonzero().flatten()[wanted]
            assert after.label_position_L.tolist() == positions.tolist()
            assert after.targets_L.tolist() == batch.labels_BT.flatten()[positions].tolist()


@pytest.mark.parametrize("score", [Fused(), Random(), Gain()])
def test_a_score_that_is_known_before_or_remembers_older_steps_is_refused(score):
    with pytest.raises(ValueError, match=r"score=.* own values alone, .* use loss, entropy or"):
        RegateConfig(execution=AfterForward(), score=score)


def test_another_quota_is_refused():
    with pytest.raises(ValueError, match="quota=Threshold.* is not read by execution=after_forw"):
        RegateConfig(execution=AfterForward(), score=LastLoss(), quota=Threshold())


@pytest.mark.parametrize("host", ["deepspeed_pipeline", "megatron"])
def test_hosts_whose_loss_is_not_ours_to_choose_refuse_it_by_name(host: str):
    require_execution(AfterForward(), "huggingface")
    with pytest.raises(ValueError, match=f"execution=after_forward is not supported under {host}"):
        require_execution(AfterForward(), host)


def test_a_run_without_the_store_that_its_score_reads_is_refused():
    config = RegateConfig(execution=AfterForward(), score=ExcessLoss(reference="student"))
    assert config.column == "student"
    with pytest.raises(ValueError, match="score=ExcessLoss needs the teacher's losses"):
        Regate(config, Stores(), total_steps=4)


def test_words_are_not_counted_as_kept_before_anything_is_chosen():
    _, batch = random_batch([[12]])
    plan, _ = planned(batch, 0.5)
    kept = WordsKept()
    kept.add([[(True, [0])]], batch, plan)
    assert kept.precision is None


def test_a_sample_is_not_drawn_before_anything_is_chosen(tmp_path: Path):
    tree = tmp_path / "run.yaml"
    tree.write_text(
        "model: {path: x}\ndata: {train: t}\nrun: {out: o, steps: 9}\n"
        "elision: {execution: after_forward, score: loss}\n"
    )
    with pytest.raises(ValueError, match="nothing to draw before it; draw loss_only"):
        picture_sample(load_config(tree), tmp_path / "sample.png")
