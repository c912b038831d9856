"""What the results under version control say of an arm, for a single run to be seen beside."""

from __future__ import annotations

from pathlib import Path

from regate_ds.recipe.learning.result import Result, read_result
from regate_ds.recipe.learning.statistics import paired

_PARTS = ("test", "dev")


def recorded_line(results: Path, task: str, arm: str, *, against: str, steps: int) -> str | None:
    """Return how far an arm was from another one, seed by seed, in runs of so many steps.

    Those on test, if there are some, else on dev; None where no seed has both arms, of one student.
    The interval is Student's at 95 %. ValueError names a result that is damaged.
    """
    for part in _PARTS:
        folder = results / task / part
        ours, theirs = (_by_start(folder, name, steps) for name in (arm, against))
        found = paired(ours, theirs)
        if found is None:
            continue
        reach = (
            "" if found.low is None else f", 95 % interval [{found.low:+.3f}, {found.high:+.3f}]"
        )
        num_seeds = len(ours.keys() & theirs.keys())
        return (
            f"the learning benchmark ({task}, {part}, seeds: {num_seeds}) has {arm} "
            f"{found.mean:+.3f} from {against}{reach}: one run says less"
        )
    return None


def _by_start(folder: Path, arm: str, steps: int) -> dict[tuple[int, str], float]:
    """Return the accuracy on words that need the image, by seed and student."""
    read = [read_result(path) for path in sorted(folder.glob(f"{arm}-seed*-steps{steps}.json"))]
    results: list[Result] = [one for one in read if one is not None]
    return {(one.seed, one.student): one.accuracy_visual for one in results}
