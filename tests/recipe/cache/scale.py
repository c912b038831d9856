"""What millions of records cost: the first index, a start, and the memory of a rank.

    python -m tests.recipe.cache.scale make FOLDER 200000 --images
    python -m tests.recipe.cache.scale build FOLDER
    python -m tests.recipe.cache.scale store FOLDER
    python -m tests.recipe.cache.scale start FOLDER

No test runs it; docs/data.md has its figures. `make` draws records of words: with --images a JSON
list of one to three turns, half of the records with one of a hundred small images; without it a
.jsonl file of short questions and answers. `store` fills a reference store with random values, as
no teacher need read millions of records for this. Times are CPU seconds of all processes, and wall
seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from regate_ds.data.llava.lines import RawRecords, find_records
from regate_ds.data.llava.template import Template, text_segments
from regate_ds.job.process import start_process
from regate_ds.recipe import corpus as corpus_module
from regate_ds.recipe import trainer as trainer_module
from regate_ds.recipe.cache.build import build
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.corpus import load_corpus, open_corpus, sources_of
from regate_ds.recipe.preflight import judge_run
from regate_ds.recipe.students.llava import build_llava
from regate_ds.recipe.students.load import make_student
from regate_ds.recipe.students.student import save_student
from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from regate_ds.session import Regate
from regate_ds.stores.reference.lifecycle import begin_store
from regate_ds.stores.reference.writer import ReferenceWriter
from regate_ds.teacher.batching import cut_shards
from tests.support.small_corpus import TEXT, VISION

TOKENS_PER_BATCH = 1 << 16


@contextmanager
def timed(what: str, spent: dict[str, float] | None = None) -> Iterator[None]:
    """Print the CPU and wall seconds of a block, those of ended child processes included."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    yield
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    if spent is not None:
        spent[what] = spent.get(what, 0.0) + cpu
    print(f"{what}: {cpu:.1f} s CPU, {wall:.1f} s", flush=True)


def cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def memory(field: str) -> int:
    """Bytes of this process: RssAnon is its private memory without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def make(folder: Path, num_records: int, *, images: bool) -> None:
    drawn = random.Random(0)
    letters = "etaoinshrdlucmfw"
    words = ["".join(drawn.choices(letters, k=drawn.randint(1, 9))) for _ in range(8_000)]
    weights = np.cumsum([1 / (rank + 10) for rank in range(len(words))]).tolist()

    def sentence(least: int, most: int) -> str:
        return " ".join(drawn.choices(words, cum_weights=weights, k=drawn.randint(least, most)))

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(100):
        Image.effect_noise((24 + number, 40), 50).convert("RGB").save(folder / f"{number}.jpg")
    lengths = (8, 40) if images else (2, 8)
    with _train(folder, images=images).open("w") as file:
        for number in range(num_records):
            with_image = images and number % 2 == 0
            talk = [
                {"from": ("human", "gpt")[part % 2], "value": sentence(*lengths)}
                for part in range(2 * drawn.choice((1, 1, 2, 3)) if images else 2)
            ]
            talk[0]["value"] = "<image>\n" * with_image + talk[0]["value"]
            record: dict[str, Any] = {"id": str(number), "conversations": talk}
            if with_image:
                record["image"] = f"{number % 100}.jpg"
            start = ("[" if number == 0 else ",") if images else ""
            file.write(f"{start}{json.dumps(record)}\n")
        file.write("]\n" if images else "")
    tokenizer = train_tokenizer((sentence(8, 40) for _ in range(5_000)), vocab_size=8_000)
    save_student(build_llava(tokenizer, text=TEXT, vision=VISION, seed=0), folder / "student")
    (folder / "run.yaml").write_text(yaml.safe_dump(_settings(folder, images=images)))


def _train(folder: Path, *, images: bool) -> Path:
    return folder / ("train.json" if images else "train.jsonl")


def _settings(folder: Path, *, images: bool) -> dict[str, Any]:
    return {
        "model": {"path": str(folder / "student")},
        "data": {"train": str(_train(folder, images=images)), "max_length": 512, "num_workers": 2},
        "teacher": {"store": str(folder / "store")},
        "elision": {"schedule": {"warmup": 0}},
        "run": {"out": str(folder / "run"), "micro_batch": 4, "accumulation": 4},
    }


def measure_build(folder: Path) -> None:
    """Index once, and do what a build must do beside its tokens once more, apart."""
    config, spent = load_config(folder / "run.yaml"), {}
    student = make_student(config.model, seed=None)
    (source,) = sources_of(config.data, corpus_module.corpus_encoder(student, config.data))
    before, highest = memory("RssAnon"), memory("VmHWM")
    with timed("build", spent):
        data = corpus_module.open_data(source, [folder / ".regate_cache"])
    grown, peak = memory("RssAnon") - before, memory("VmHWM") - highest
    num_records, num_labels = data.about["num_records"], data.index.num_tokens
    print(f"{num_records} records, {num_labels} label positions")
    print(f"the build left {grown / num_records:.0f} bytes a record, and took {peak / 1e6:.0f} MB")
    with timed("places", spent):
        places = find_records(source.path)
    raw, parser = RawRecords(source.path, places), source.parser(verify_images=True)
    with timed("JSON, checks and image headers", spent):
        texts, sizes = [], 0
        for number in range(num_records):
            record = parser.record(number, raw[number])
            for image in record.images:
                with Image.open(image) as opened:
                    sizes += opened.size[0]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer: Any = student.tokenizer
    for number in range(0, num_records, 1_000):
        records = data.records[number : number + 1_000]
        texts = [text for one in records for text in text_segments(one, Template())]
        begin = cpu_seconds()
        tokenizer(texts, return_offsets_mapping=True)
        spent["tokenizer"] = spent.get("tokenizer", 0.0) + cpu_seconds() - begin
    few = folder / "few"
    few.mkdir(exist_ok=True)
    (folder / "few.json").write_text(f"[{json.dumps(raw[1])}]")
    (one,) = sources_of(
        load_config(folder / "run.yaml", [f"data.train={folder / 'few.json'}"]).data, source.encoder
    )
    with timed("start of two workers", spent):
        build(one, few, num_workers=2)
    apart = spent["places"] + spent["JSON, checks and image headers"]
    tokens = spent["build"] - apart
    print(f"tokenizer(texts, return_offsets_mapping=True): {spent['tokenizer']:.1f} s CPU")
    print(
        f"build without JSON and image headers: {tokens:.1f} s CPU, "
        f"{tokens / spent['tokenizer']:.2f} of the tokenizer"
    )


def make_store(folder: Path) -> None:
    index = load_corpus(load_config(folder / "run.yaml"), weights=False).index
    cut = partial(cut_shards, num_positions=index.num_positions, tokens_per_batch=TOKENS_PER_BATCH)
    begin_store(folder / "store", index, "random", cut, TOKENS_PER_BATCH)
    writer = ReferenceWriter(folder / "store", index)
    for number, shard in enumerate(writer.shards):
        writer.write_shard(number, 3 * torch.rand(shard.num_values))
    writer.finish()


class Planned(Exception):
    """The first step has its plan; with the private memory at that moment."""


def measure_start(folder: Path) -> None:
    """From the end of imports to the first plan, the student and the engine apart."""
    start_process()  # Imports deepspeed.
    before, spent = memory("RssAnon"), {}
    config = load_config(folder / "run.yaml", [f"run.out={folder / f'run-{time.time_ns()}'}"])
    apart(corpus_module, "make_student", spent)
    apart(trainer_module, "make_engine", spent)
    plan = Regate.plan_step

    def plan_once(*told: Any, **named: Any) -> Any:
        plan(*told, **named)
        raise Planned(memory("RssAnon"))

    Regate.plan_step = plan_once
    cpu, wall = cpu_seconds(), time.perf_counter()
    try:
        judge_run(config)
        process = start_process()
        trainer_module.Trainer(config, open_corpus(config), process).run()
    except Planned as planned:
        grown = planned.args[0] - before
        cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    index = corpus_module.load_corpus(config, weights=False).index
    print(
        f"{index.num_samples} samples, {index.num_tokens} label positions: first plan after "
        f"{wall:.1f} s ({cpu:.1f} s CPU), of which {spent} s are student and engine; private "
        f"memory grew by {grown / 1e6:.1f} MB"
    )


def apart(module: Any, name: str, spent: dict[str, float]) -> None:
    real: Callable[..., Any] = getattr(module, name)

    def call(*told: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        made = real(*told, **named)
        spent[name] = round(time.perf_counter() - begin, 2)
        return made

    setattr(module, name, call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["make", "build", "store", "start"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("num_records", type=int, nargs="?", default=200_000)
    parser.add_argument("--images", action="store_true")
    told = parser.parse_args()
    torch.set_num_threads(1)
    if told.what == "make":
        make(told.folder, told.num_records, images=told.images)
    else:
        {"build": measure_build, "store": make_store, "start": measure_start}[told.what](
            told.folder
        )


if __name__ == "__main__":
    main()
