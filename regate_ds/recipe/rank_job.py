"""The job of `regate rank`: rank the tokens of the training set's images into a store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import partial

import numpy as np

from regate_ds.algorithm.rankings.ranking import StoredRanking
from regate_ds.data.llava.images import load_rgb
from regate_ds.data.llava.media import InlineImage, PictureSource, Video, VideoFrame
from regate_ds.families.pictures import pictures_of
from regate_ds.job.process import Process
from regate_ds.job.supervise import join_job
from regate_ds.job.watch import Signs
from regate_ds.ranking.api import model_id_for
from regate_ds.ranking.job import PictureInputs, RankJob, Units, rank_pictures
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import Corpus, open_corpus
from regate_ds.recipe.preflight import judge_rank, require_one_data_set
from regate_ds.stores.image_orders.pictures import PictureTable


def run_rank(config: RunConfig) -> None:
    """Rank the images of the training set into `rank.store`; keep finished shards."""
    ranking = judge_rank(config)
    with join_job("rank", Signs(patience=config.run.hang_seconds)) as process:
        # Pixels need no model.
        corpus = open_corpus(config, weights=ranking.reads != "pixels")
        require_one_data_set(corpus.index.fingerprint, process)
        job = make_rank_job(config, corpus, ranking, process)
        done = rank_pictures(job, process.group, process.device)
        if process.is_first:
            table = job.units.table
            size = f"{table.num_images} images, which show {len(table)} files"
            print(f"rank: {done}; {job.store} is complete with {size}, ranking {ranking.stored}")


def make_rank_job(
    config: RunConfig, corpus: Corpus, ranking: StoredRanking, process: Process
) -> RankJob:
    """Make the job: each image file is a picture, which is run once."""
    student, files = corpus.student, _Files(corpus)
    if ranking.reads != "pixels":
        student.model.to(process.device)
    assert config.rank.store is not None
    return RankJob(
        units=files.units(),
        read=files.read,
        look=partial(pictures_of, student.model, reads=ranking.reads),
        ranking=ranking,
        fingerprint=corpus.index.fingerprint,
        model_id=model_id_for(ranking, student.model),
        store=config.rank.store,
        batch=config.rank.batch,
    )


class _Files:
    """The image files of a corpus, each once, in the order in which the data names them.

    Of each image are kept a hash of its file and its record; the file itself is found there again.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        digest_I = np.frombuffer(b"".join(self._digests()), dtype=_DIGEST)
        found = np.unique(digest_I, return_index=True, return_inverse=True)
        _, first_of_file, file_I = found
        # Numbered by hash; the data's own order is that of their first images.
        in_order = np.argsort(first_of_file)
        rank_of = np.empty_like(in_order)
        rank_of[in_order] = np.arange(len(in_order))
        self._file_I = rank_of[file_I.reshape(-1)]
        self._first_image_P = first_of_file[in_order]

    def units(self) -> Units:
        """Return each file as a unit of its own."""
        data, student = self._corpus.train_set, self._corpus.student
        order_I = np.argsort(self._file_I, kind="stable")
        row_I, number_I = self._places(order_I)
        sizes, kind_P = np.unique(
            data.image_sizes[self._first_image_P], axis=0, return_inverse=True
        )
        tokens = np.array([student.vision.num_tokens(tuple(size)) for size in sizes.tolist()])
        table = PictureTable(
            tokens[kind_P.reshape(-1)].astype(np.int32),
            self._file_I[order_I].astype(np.int32),
            (data.source.name,),
            np.zeros(len(order_I), dtype=np.int32),
            data.index.keys.record_numbers[row_I].astype(np.int64),
            number_I.astype(np.int32),
        )
        return Units(table, np.arange(len(self._first_image_P) + 1))

    def read(self, number: int) -> PictureInputs:
        """Return the model inputs of a file, by its number."""
        (row,), (image,) = self._places(self._first_image_P[number : number + 1])
        source = self._corpus.train_records[int(row)].images[int(image)]
        return self._corpus.student.vision.pixels([load_rgb(source)])

    def _places(self, image_I: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the row of each image's sample, and the image's number in it."""
        first = self._corpus.train_set.first_image
        row_I = np.searchsorted(first, image_I, side="right") - 1
        return row_I, image_I - first[row_I]

    def _digests(self) -> Iterator[bytes]:
        for record in self._corpus.train_records:
            for image in record.images:
                if isinstance(image, Video):
                    raise ValueError(
                        f"{record.source}, record {record.key[1]}, has a video, whose tokens are "
                        "not ranked; use elision.images.ranking=random or stride"
                    )
                yield hashlib.blake2b(_identity(image), digest_size=_DIGEST.itemsize).digest()


_DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])


def _identity(image: PictureSource) -> bytes:
    """Return what two images share if they are of one file."""
    if isinstance(image, InlineImage):
        return b"bytes\0" + image.content
    if isinstance(image, VideoFrame):
        return f"frame {image.number} of {image.of}\0{image.video}".encode(errors="surrogateescape")
    return b"file\0" + os.fsencode(image)
