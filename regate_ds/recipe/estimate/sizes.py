"""The sizes of a run's samples, from its answer index and the sizes of their images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

from regate_ds.cost.samples import SampleSize, sample_flops
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import Corpus
from regate_ds.recipe.estimate.ran import run_host, run_shape


def sample_sizes(corpus: Corpus) -> list[SampleSize]:
    """Return the size of each training sample; an image that truncation has cut counts its rest."""
    data, vision = corpus.train_set, corpus.student.vision
    known: dict[tuple[int, int], int] = {}
    found = []
    for row in range(data.index.num_samples):
        tokens, answers = int(data.index.num_positions[row]), int(data.index.num_labels[row])
        left, images = tokens - answers, list[int]()
        for width, height in data.image_sizes[data.first_image[row] : data.first_image[row + 1]]:
            size = int(width), int(height)
            if size not in known:
                known[size] = vision.num_tokens(size)
            images.append(min(known[size], left))
            left -= images[-1]
        found.append(SampleSize(tokens, answers, tuple(images)))
    return found


def costs_of(
    config: RunConfig, corpus: Corpus, total_steps: int
) -> Callable[[int], Sequence[float]]:
    """Return what each training sample costs in a step: another in a sparse one than in a dense.

    Its argument is the optimizer step. Shares that move over the run are taken at its middle.
    """
    elision, shape = config.elision, run_shape(run_host(config))
    last = elision.last_layer or shape.depth
    sizes = sample_sizes(corpus)
    # Samples of one size are many.
    of = cache(partial(sample_flops, shape))
    costs = {True: [of(one) for one in sizes]}
    if elision.chooses:
        spans = elision.execution.spans(elision.first_layer, last)
        shares = elision.shares_at(0.5) if elision.execution.chooses else None
        costs[False] = [of(one, shares, spans) for one in sizes]
    schedules = elision.schedules(total_steps)
    return lambda step: costs[schedules.is_dense(step) or not elision.chooses]
