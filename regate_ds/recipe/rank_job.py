"""The job of `regate rank`: rank the tokens of the training set's images into a store."""

from __future__ import annotations

from functools import partial

from regate_ds.algorithm.rankings.ranking import ImageKey, StoredRanking
from regate_ds.data.llava.images import image_size, load_rgb
from regate_ds.data.llava.media import PictureSource, Video
from regate_ds.families.pictures import pictures_of
from regate_ds.job.process import Process
from regate_ds.job.supervise import join_job
from regate_ds.ranking.api import model_id_for
from regate_ds.ranking.job import PictureInputs, RankJob, rank_pictures
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import Corpus, open_corpus
from regate_ds.recipe.preflight import judge_rank, require_one_data_set
from regate_ds.recipe.students.student import Student
from regate_ds.stores.image_orders.pictures import ShownPicture


def run_rank(config: RunConfig) -> None:
    """Rank the images of the training set into `rank.store`; keep finished shards."""
    ranking = judge_rank(config)
    with join_job("rank") as process:
        # Pixels need no model.
        corpus = open_corpus(config, weights=ranking.reads != "pixels")
        require_one_data_set(corpus.index.fingerprint, process)
        job = make_rank_job(config, corpus, ranking, process)
        done = rank_pictures(job, process.group, process.device)
        if process.is_first:
            shown = [len(picture.images) for unit in job.units for picture in unit]
            size = f"{sum(shown)} images, which show {len(shown)} files"
            print(f"rank: {done}; {job.store} is complete with {size}, ranking {ranking.stored}")


def make_rank_job(
    config: RunConfig, corpus: Corpus, ranking: StoredRanking, process: Process
) -> RankJob:
    """Make the job: each image file is a picture, which is run once."""
    student, shown = corpus.student, _images_by_file(corpus)
    if ranking.reads != "pixels":
        student.model.to(process.device)
    files = list(shown)
    assert config.rank.store is not None
    return RankJob(
        units=[[ShownPicture(_num_tokens(student, file), tuple(shown[file]))] for file in files],
        read=partial(_read, student, files),
        look=partial(pictures_of, student.model, reads=ranking.reads),
        ranking=ranking,
        fingerprint=corpus.index.fingerprint,
        model_id=model_id_for(ranking, student.model),
        store=config.rank.store,
        batch=config.rank.batch,
    )


def _images_by_file(corpus: Corpus) -> dict[PictureSource, list[ImageKey]]:
    """Return the images that show each file, in the order in which the data names them."""
    shown: dict[PictureSource, list[ImageKey]] = {}
    for record in corpus.train_records:
        for number, file in enumerate(record.images):
            if isinstance(file, Video):
                raise ValueError(
                    f"{record.source}, record {record.key[1]}, has a video, whose tokens are not "
                    "ranked; use elision.images.ranking=random or stride"
                )
            shown.setdefault(file, []).append((record.key, number))
    return shown


def _num_tokens(student: Student, file: PictureSource) -> int:
    return student.vision.num_tokens(image_size(file))


def _read(student: Student, files: list[PictureSource], number: int) -> PictureInputs:
    return student.vision.pixels([load_rgb(files[number])])
