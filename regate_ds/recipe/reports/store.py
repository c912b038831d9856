"""`regate store`: describe and verify a reference store.

info STORE      counts, and a histogram of the values
verify STORE    compare every byte of every file with its checksum
show CONFIG     the words that the teacher finds hardest and easiest, or, in a store of gains, those
                that the image helps most and least
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from regate_ds.data.llava.records import Record
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.job.progress import progress
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import load_corpus
from regate_ds.recipe.evaluation.words import counted_words
from regate_ds.stores.kind import Verify
from regate_ds.stores.reference.manifest import APPEND_NAME, Manifest, shard_path
from regate_ds.stores.reference.reader import ReferenceStore

EDGES = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, float("inf"))
"""Edges of the histogram's bins, in nats."""

GAIN_EDGES = (-float("inf"), -4.0, -1.0, -0.1, 0.0, 0.1, 1.0, 4.0, float("inf"))
"""The same for gains, which may be below 0."""

_BAR = 40


def info(path: Path, verify: Verify = "quick") -> str:
    """Return counts and a histogram of a store; ValueError if it is damaged or unfinished."""
    store = ReferenceStore(path, verify=verify)
    index, values_N = store.index, store.read(store.index.keys)
    num_answerless = int((index.num_labels == 0).sum())
    is_gain = store.column == "gain"
    rows = [
        ("teacher", store.teacher_id),
        ("column", store.column),
        ("data", store.fingerprint),
        ("samples", f"{index.num_samples} ({num_answerless} without an answer)"),
        ("answer tokens", f"{index.num_tokens}"),
        ("all tokens", f"{int(index.num_positions.sum())}"),
        ("on disk", f"{sum(f.stat().st_size for f in path.iterdir())} bytes"),
        ("shards", f"{store.num_shards}"),
    ]
    rows += _pending_rows(path, index.num_samples)
    lines = [f"{name:<14}{value}" for name, value in rows]
    if len(values_N):
        middle = f"mean {float(values_N.mean()):.3f}, median {float(values_N.median()):.3f} nats"
        name, edges = ("gains", GAIN_EDGES) if is_gain else ("losses", EDGES)
        lines += [f"{name:<14}{middle}", "", *_histogram(values_N, edges)]
    return "\n".join(lines)


def _pending_rows(path: Path, num_samples: int) -> list[tuple[str, str]]:
    """Return a row on the samples that an interrupted job has begun to add; [] if there is none."""
    if not (path / APPEND_NAME).exists():
        return []
    shards = Manifest.load(path, APPEND_NAME).shards
    num_new = sum(shard.num_rows for shard in shards) - num_samples
    left = sum(not shard_path(path, number).exists() for number in range(len(shards)))
    text = f"{num_new} samples are being added, {left} shards are still to compute"
    return [("to come", f"{text}: run `regate teacher` on that data again")]


def _histogram(values_N: Tensor, edges: tuple[float, ...]) -> Iterator[str]:
    bins_N = torch.bucketize(values_N, torch.tensor(edges[1:-1]), right=True)
    counts = torch.bincount(bins_N, minlength=len(edges) - 1)
    for low, high, count in zip(edges, edges[1:], counts.tolist()):
        share = count / len(values_N)
        yield f"{low:>5g} to {high:<5g}{share:>7.1%} {'#' * round(_BAR * share)}".rstrip()


def verify(path: Path) -> str:
    """Compare every byte; ValueError names the first file that is missing or has a wrong byte."""
    store = ReferenceStore(path, verify="full")
    return f"{path}: {store.num_shards} shards, {store.index.num_tokens} values, all as written"


def show(config: RunConfig, *, num_words: int = 15, least: int = 3) -> str:
    """Return tables of the training answers' words with the highest and the lowest values.

    A word's value is the sum over its tokens, and the mean over its uses. Words used fewer than
    ``least`` times are left out.
    """
    if config.teacher.store is None:
        raise ValueError("teacher.store=None: there is nothing to show; name the store's folder")
    store = ReferenceStore(config.teacher.store, verify=config.teacher.verify)
    corpus = load_corpus(config, weights=False)
    store.require(corpus.index.fingerprint)
    losses: dict[str, list[float]] = defaultdict(list)
    with progress(len(corpus.train_records), desc="words", unit="sample") as bar:
        for number, record in enumerate(corpus.train_records):
            sample = corpus.train.encode(number)
            for word, loss in word_losses(record, sample, store.read([sample.key])):
                losses[word].append(loss)
            bar.update()
    means = {w: sum(x) / len(x) for w, x in losses.items() if len(x) >= least}
    order = sorted(means, key=lambda word: (-means[word], word))
    hardest, easiest = order[:num_words], order[::-1][:num_words]
    names = ("most gain", "least gain") if store.column == "gain" else ("hardest", "easiest")
    parts = zip(names, (hardest, easiest))
    return "\n\n".join(_table(name, words, means, losses) for name, words in parts)


def word_losses(
    record: Record, sample: EncodedSample, losses_N: Tensor
) -> Iterator[tuple[str, float]]:
    """Yield each word of the answers with the summed value, in nats, of the tokens over it."""
    for number, turn in enumerate(record.turns):
        for word, tokens in counted_words(turn, number, sample):
            yield turn.answer[word.start : word.end], float(losses_N[tokens].sum())


def _table(
    name: str, words: list[str], means: dict[str, float], losses: dict[str, list[float]]
) -> str:
    rows = [f"{word:<20}{means[word]:>8.3f}{len(losses[word]):>8}" for word in words]
    return "\n".join([f"{name:<20}{'nats':>8}{'uses':>8}", *rows])
