"""A step between its plan and its end: what was planned, and what its forward passes gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.difficulty import updated_statistics
from regate_ds.algorithm.plan import ElisionPlan, StepPlan
from regate_ds.algorithm.quotas.quota import QuotaState
from regate_ds.algorithm.scores.score import Statistic


@dataclass
class OpenStep:
    """The state of a step that is planned and not ended."""

    plan: StepPlan
    window: Sequence[TokenBatch]
    statistics: Mapping[str, Tensor]
    """Columns of the difficulty store at the window's label positions, as the step began."""

    quota_state: QuotaState
    """What the quota remembers once the step is ended."""

    recorded: dict[int, Mapping[str, Tensor]] = field(
        default_factory=dict[int, Mapping[str, Tensor]]
    )

    _followed: dict[int, ElisionPlan] = field(default_factory=dict[int, ElisionPlan])
    """The plan that each forward pass followed, with what was chosen after it."""

    def record(self, plan: ElisionPlan, values: Mapping[str, Tensor]) -> None:
        """Take the values of one micro-batch's targets, by name; plan: that of the output.

        RuntimeError for another step's plan or a second record, ValueError for values of another
        number than the plan's targets.
        """
        step = self.plan.step
        sizes = (one.num_targets for one in self.plan.micro if one.micro == plan.micro)
        is_of_step = plan.step == step and plan.num_targets == next(sizes, None)
        if not is_of_step or plan.micro in self.recorded:
            raise RuntimeError(
                f"losses of step {plan.step}, micro-batch {plan.micro} do not belong here: step "
                f"{step} is open and has micro-batches {sorted(self.recorded)} already; give the "
                "output of each micro-batch once"
            )
        for name, values_L in values.items():
            if values_L.shape != (plan.num_targets,):
                raise ValueError(
                    f"{plan.num_targets} targets, but {name} {tuple(values_L.shape)}; give one "
                    "value for each target of the plan"
                )
        self._followed[plan.micro] = plan
        self.recorded[plan.micro] = {name: value.detach() for name, value in values.items()}

    def require_complete(self) -> None:
        """Refuse, by RuntimeError, to end a step of which some micro-batch gave no losses."""
        missing = set(range(len(self.plan.micro))) - set(self.recorded)
        if missing:
            raise RuntimeError(
                f"step {self.plan.step}: no losses of micro-batches {sorted(missing)}; call "
                "regate.loss on the output of each"
            )

    def updated(self, statistics: Sequence[Statistic]) -> dict[str, Tensor]:
        """Return each statistic at all label positions of the window after the step."""
        micro = [
            one if one.num_chosen is None else self._followed[one.micro].to("cpu")
            for one in self.plan.micro
        ]
        return updated_statistics(statistics, self.window, micro, self.statistics, self.recorded)
