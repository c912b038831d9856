"""The method's configuration; docs/algorithm.md has the formulas, arXiv 2507.21420 is the paper.

The short form is here; what a score, a quota or an execution alone needs stands beside it, in
`algorithm/`, and in a file under the name of the method:

    elision: {keep_share: 0.5, score: fused, fused: {reference_weight: 0.5}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from regate_ds.algorithm.executions.after_forward import AfterForward
from regate_ds.algorithm.executions.elide import Elide
from regate_ds.algorithm.executions.execution import Execution
from regate_ds.algorithm.executions.table import EXECUTIONS
from regate_ds.algorithm.executions.weighted import Weighted
from regate_ds.algorithm.knobs import Rule, refuse_knobs
from regate_ds.algorithm.quotas.per_sample import PerSample
from regate_ds.algorithm.quotas.quota import Quota
from regate_ds.algorithm.quotas.table import QUOTAS
from regate_ds.algorithm.rankings.ranking import StoredRanking
from regate_ds.algorithm.rankings.table import stored_ranking
from regate_ds.algorithm.rows import RowLayout
from regate_ds.algorithm.schedule import (
    Course,
    KeepShare,
    Schedules,
    elides,
    share_at,
    share_rules,
)
from regate_ds.algorithm.scores.fused import Fused
from regate_ds.algorithm.scores.score import Column, Score, Statistic
from regate_ds.algorithm.scores.table import SCORES
from regate_ds.algorithm.window import Method
from regate_ds.images_config import ImagesConfig
from regate_ds.merge_config import MergeConfig
from regate_ds.methods_together import rules_of_draws, rules_of_images, rules_together
from regate_ds.schedule_config import ScheduleConfig
from regate_ds.settings.former_keys import moved_keys
from regate_ds.settings.refuse import refuse_choices


@dataclass(frozen=True, kw_only=True)
class RegateConfig:
    """What is kept, when, and where in the decoder. Frozen; impossible values fail at birth."""

    enabled: bool = True
    """False: no hook is installed and the run is the host's own, bit for bit."""

    execution: Execution = field(default_factory=Elide)
    """What becomes of unchosen label positions in a sparse step; `none` makes every step dense (the
    baseline that elision is measured against)."""

    score: Score = field(default_factory=Fused)
    """What ranks the label positions; the highest are kept."""

    quota: Quota = field(default_factory=PerSample)
    """How many of each sample are kept."""

    keep_share: KeepShare = 0.5
    """Share of the label positions that are kept in a sparse step; 1.0 keeps them all. It may move
    over the run (see `keep_share.*`)."""

    first_layer: int = 1
    """Index of the first gated decoder layer: how many layers before it see every token."""

    last_layer: int | None = None
    """Index after the last gated layer; null is the depth of the decoder."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Which steps are dense (see `schedule.*`)."""

    images: ImagesConfig = field(default_factory=ImagesConfig)
    """How many image tokens are kept (see `images.*`)."""

    merge: MergeConfig = field(default_factory=MergeConfig)
    """Whether the run begins with steps on patches of tokens (see `merge.*`)."""

    token_multiple: int = 1
    """Rows of kept tokens are a multiple of this length, filled with the next-best label positions,
    then with the next tokens of elided images, and where none is left with padding."""

    CHOICES: ClassVar[dict[str, Mapping[str, type[Any]]]] = {
        "execution": EXECUTIONS,
        "score": SCORES,
        "quota": QUOTAS,
    }
    """Fields that a file gives by name, with the method's own knobs under that name."""

    MOVED: ClassVar[dict[str, str]] = {
        "total_steps": "schedule.total_steps",
        "warmup": "schedule.warmup",
        "cycle_steps": "schedule.cycle_steps",
        "cycle_dense_steps": "schedule.cycle_dense_steps",
        "final_dense_share": "schedule.final_dense_share",
        "fusion": "fused.fusion",
        "reference_weight": "fused.reference_weight",
        "decay": "fused.decay",
        "align": "elide.align",
    }
    """Keys of older files, and where they stand now."""

    @classmethod
    def prepare(cls, values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Read older keys of a file where they stand now, saying so in one line each."""
        return moved_keys(values, cls.MOVED, where)

    def __post_init__(self) -> None:
        kinds = {name: tuple(table.values()) for name, table in self.CHOICES.items()}
        sections = {"schedule": ScheduleConfig, "images": ImagesConfig, "merge": MergeConfig}
        refuse_choices(self, kinds | {name: (kind,) for name, kind in sections.items()})
        refuse_knobs(self, self._rules)

    def _rules(self) -> list[Rule]:
        last, first = self.last_layer, self.first_layer
        return [
            *share_rules("keep_share", self.keep_share),
            *rules_together(self.execution, self.score, self.quota, self.keep_share),
            ("first_layer", first >= 0, "must be 0 or more"),
            (
                "last_layer",
                last is None or last > first,
                f"must be above first_layer={first}, or null for the decoder's depth",
            ),
            ("token_multiple", self.token_multiple >= 1, "must be at least 1"),
            (
                "execution",
                not self.chooses_images or bool(self.execution.spans(0, 1)),
                f"moves no rows, so that images.keep_share={self.images.keep_share} would elide "
                "no image token; use elide, or set images.keep_share=1.0",
            ),
            *rules_of_images(self.execution, self.images),
            *rules_of_draws(self.execution, self.score, self.images, last),
        ]

    @property
    def weighs(self) -> bool:
        """Whether sparse steps give every label position a loss, with a weight by its score."""
        return isinstance(self.execution, Weighted)

    @property
    def chooses_after_forward(self) -> bool:
        """Whether sparse steps choose by their own losses."""
        return isinstance(self.execution, AfterForward)

    @property
    def chooses_answers(self) -> bool:
        """Whether some steps choose among label positions, or weigh them."""
        is_ranked = elides(self.keep_share) or self.weighs
        return self.enabled and self.execution.chooses and is_ranked

    @property
    def chooses_images(self) -> bool:
        """Whether some steps choose among image tokens."""
        return self.enabled and self.execution.chooses and elides(self.images.keep_share)

    @property
    def chooses(self) -> bool:
        """Whether some steps are sparse; else every step keeps every token."""
        return self.chooses_answers or self.chooses_images

    @property
    def column(self) -> Column | None:
        """What of a reference store the run reads; None reads none."""
        return self.score.column if self.chooses_answers else None

    @property
    def needs_reference(self) -> bool:
        """Whether a reference store, or an online teacher, is read."""
        return self.column is not None

    @property
    def stored_ranking(self) -> StoredRanking | None:
        """The ranking whose orders are computed once and read; None if none is."""
        return stored_ranking(self.images.ranking) if self.chooses_images else None

    def never_sparse(self, num_steps: int) -> dict[str, ScheduleConfig]:
        """Return, by key, the schedules that elide nothing of what is to be, in so many steps."""
        never, own = self.schedules(num_steps).never_choosing(num_steps), self.images.schedule
        found = {"schedule": self.schedule} if "answers" in never else {}
        if "images" in never:
            found["schedule" if own is None else "images.schedule"] = own or self.schedule
        return found

    def schedules(self, total_steps: int) -> Schedules:
        """Return when answers and when images are elided in a run of so many steps."""
        start, own = self.merge.in_steps(total_steps), self.images.schedule or self.schedule
        schedule, of_images = (one.in_steps(total_steps - start) for one in (self.schedule, own))
        answers = Course(schedule=schedule, share=self.keep_share, weighs=self.weighs)
        images = Course(schedule=of_images, share=self.images.keep_share)
        return Schedules(
            answers=answers if self.chooses_answers else None,
            images=images if self.chooses_images else None,
            start=start,
        )

    def shares_at(self, place: float) -> tuple[float, float]:
        """Return the shares that a sparse step keeps of the answers and of the images, at a place
        of the sparse part of the run, from 0 to 1."""
        return share_at(self.keep_share, place), share_at(self.images.keep_share, place)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """Columns of the difficulty store that the run reads and updates."""
        return self.score.statistics if self.chooses_answers else ()

    def records(self, of: str) -> bool:
        """Whether a statistic is made of this, so that the host must record it."""
        return any(one.of == of for one in self.statistics)

    @property
    def rows(self) -> RowLayout:
        """How kept rows lie where the host does not say: an MLP takes all of a micro-batch's."""
        is_mlp = any(span.part == "mlp" for span in self.execution.spans(0, 1))
        return RowLayout(row_format="ragged" if is_mlp else "padded", multiple=self.token_multiple)

    def method(self, answer_share: float, image_share: float) -> Method:
        """Return the method of a step that keeps these shares."""
        return Method(
            score=self.score,
            quota=self.quota,
            execution=self.execution,
            keep_share=answer_share,
            ranking=self.images.ranking,
            image_share=image_share,
            fill_rows=self.images.fill_rows,
            layers=range(self.first_layer, self.last_layer or 0),
        )


def require_config(key: str, config: object) -> None:
    """Refuse, by ValueError naming the argument ``key``, what is no RegateConfig: a dict, say."""
    if not isinstance(config, RegateConfig):
        raise ValueError(
            f"{key}={config!r}: must be a RegateConfig; write {key}=RegateConfig(keep_share=0.5)"
        )


def require_steps(total_steps: object) -> None:
    """Refuse, by ValueError, a length of a run that is not a whole number of optimizer steps."""
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(
            f"total_steps={total_steps!r}: must be a whole number, at least 1: the optimizer steps "
            "of the whole run"
        )
