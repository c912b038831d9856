"""Packed rows of models whose positions have several axes: each sample is as if it stood alone."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from regate_ds.cli import main
from regate_ds.data.collate import Collator
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.corpus import Corpus, load_corpus
from tests.support.chat_corpus import make_chat_corpus
from tests.support.ranks import PRELOADED

LENGTH = 2048


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def path(request, tmp_path_factory):
    return make_chat_corpus(tmp_path_factory.mktemp(request.param), request.param)


def logits_of(corpus: Corpus, collate: Collator) -> dict[str, Tensor]:
    """Return each sample's logits, in fp64."""
    model = corpus.student.model.double().eval()
    batch = collate([corpus.train[row] for row in range(len(corpus.train))])
    inputs = {
        name: value.double() if value.is_floating_point() else value
        for name, value in batch.inputs.items()
    }
    with torch.no_grad():
        # With a cache transformers takes a row for one sample.
        logits_BTV = model(**inputs, use_cache=False).logits
    found = {}
    for row, keys in enumerate(batch.tokens.keys):
        for segment, key in enumerate(keys):
            found[str(key)] = logits_BTV[row, batch.tokens.segment_BT[row] == segment]
    return found


def test_a_packed_sample_has_the_logits_that_it_has_alone(path):
    corpus = load_corpus(load_config(path, [f"data.pack_length={LENGTH}"]))
    packed = logits_of(corpus, corpus.collator)
    alone = logits_of(corpus, load_corpus(load_config(path)).collator)
    shown = {len(corpus.train.encode(row).images) for row in range(len(corpus.train))}
    assert len(shown) > 1
    assert packed.keys() == alone.keys()
    for key, expected in alone.items():
        assert torch.allclose(packed[key], expected, rtol=0, atol=1e-9), key


def test_rows_are_fewer_and_the_texts_own_positions_come_first(path):
    corpus = load_corpus(load_config(path, [f"data.pack_length={LENGTH}"]))
    samples = [corpus.train[row] for row in range(len(corpus.train))]
    batch = corpus.collator(samples)
    position_ABT, segment_BT = batch.inputs["position_ids"], batch.tokens.segment_BT
    assert position_ABT.shape == (4, *segment_BT.shape)
    assert len(segment_BT) < len(samples)
    for row, keys in enumerate(batch.tokens.keys):
        for segment in range(len(keys)):
            own_n = position_ABT[0, row, segment_BT[row] == segment]
            assert own_n.tolist() == list(range(len(own_n)))


def test_rows_of_texts_alone_have_the_texts_positions_on_all_axes(tmp_path):
    path = make_chat_corpus(tmp_path, "qwen2_vl", num_train=3)
    given = [f"data.pack_length={LENGTH}", "data.template.image_start=<|vision_start|>"]
    given.append("data.template.image_end=<|vision_end|>")
    corpus = load_corpus(load_config(path, given), weights=False)
    (text,) = (row for row in range(3) if not corpus.train.encode(row).images)
    batch = corpus.collator([corpus.train[text]] * 2)
    assert "mm_token_type_ids" not in batch.inputs
    length = len(corpus.train.encode(text))
    expected = torch.arange(length).repeat(2)
    assert torch.equal(batch.inputs["position_ids"], expected.expand(4, 1, -1))


def train(given: list[str]) -> None:
    sys.exit(main(["train", *given]))


def test_a_run_of_packed_rows_has_the_losses_of_one_sample_a_row(path):
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    losses = []
    given = [str(path), "run.micro_batch=4", "run.deepspeed=null", "elision.score=random"]
    given += ["teacher.store=null", "elision.images.ranking=random"]
    for name, more in (("rows", []), ("packed", [f"data.pack_length={LENGTH}"])):
        out = path.parent / name
        # A process has one job: DeepSpeed keeps its groups.
        process = context.Process(target=train, args=([*given, *more, f"run.out={out}"],))
        process.start()
        process.join()
        assert process.exitcode == 0
        rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        losses.append(
            [(row["loss"], row["answer_kept"], row["image_kept"]) for row in rows if "loss" in row]
        )
    assert len(losses[0]) == 4
    assert [row[1:] for row in losses[0]] == [row[1:] for row in losses[1]]
    assert [row[0] for row in losses[0]] == pytest.approx([row[0] for row in losses[1]], rel=1e-4)
