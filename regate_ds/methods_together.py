"""Which settings go with executions that do not choose by score and quota as `elide` does."""

from __future__ import annotations

from regate_ds.algorithm.executions.after_forward import AfterForward, ranks_fresh_values
from regate_ds.algorithm.executions.elide_images import ElideImages
from regate_ds.algorithm.executions.execution import Execution
from regate_ds.algorithm.executions.random_ltd import RandomLtd
from regate_ds.algorithm.executions.table import execution_name
from regate_ds.algorithm.executions.weighted import Weighted
from regate_ds.algorithm.knobs import Rule
from regate_ds.algorithm.quotas.per_sample import PerSample
from regate_ds.algorithm.quotas.quota import Quota
from regate_ds.algorithm.schedule import KeepShare, elides
from regate_ds.algorithm.scores.score import Score
from regate_ds.images_config import ImagesConfig


def rules_together(
    execution: Execution, score: Score, quota: Quota, keep_share: KeepShare
) -> list[Rule]:
    """Return what holds where all labels are weighed, or a step's own losses choose."""
    if not isinstance(execution, Weighted | AfterForward):
        return []
    name = execution_name(execution)
    rules: list[Rule] = [
        (
            "quota",
            isinstance(quota, PerSample),
            f"is not read by execution={name}; leave it out",
        )
    ]
    if isinstance(execution, Weighted):
        problem = f"execution={name} gives every label position a loss; set keep_share=1.0"
        return [*rules, ("keep_share", not elides(keep_share), problem)]
    problem = (
        f"is not made of a step's own values alone, by which execution={name} chooses; use loss, "
        "entropy or excess_loss"
    )
    return [*rules, ("score", ranks_fresh_values(score), problem)]


def rules_of_images(execution: Execution, images: ImagesConfig) -> list[Rule]:
    """Return what holds where image tokens alone leave the layers."""
    if not isinstance(execution, ElideImages):
        return []
    problem = (
        "keeps every answer in the layers, and images.keep_share=1.0 every image token: set that "
        "below 1, or use execution=loss_only"
    )
    return [("execution", elides(images.keep_share), problem)]


def rules_of_draws(
    execution: Execution, score: Score, images: ImagesConfig, last_layer: int | None
) -> list[Rule]:
    """Return what holds where each layer draws its tokens, and nothing ranks them."""
    if not isinstance(execution, RandomLtd):
        return []
    return [
        (
            "score",
            not (score.column or score.statistics),
            "reads a store, but execution=random_ltd ranks nothing; set score=random",
        ),
        (
            "images",
            not elides(images.keep_share),
            "keep_share is below 1, but execution=random_ltd draws image tokens as all others; "
            "set images.keep_share=1.0",
        ),
        (
            "last_layer",
            last_layer is not None,
            "must be a number with execution=random_ltd, which draws for each gated layer "
            "without the model; its paper leaves out the last layer: the decoder's depth - 1",
        ),
    ]
