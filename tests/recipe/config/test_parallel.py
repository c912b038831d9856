"""`parallel`: what is refused before anything is loaded, and rows of one length in a window."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.collate import Batch
from regate_ds.parallel.resharding import SequenceCut
from regate_ds.recipe.config import megatron_limits
from regate_ds.recipe.config.megatron_limits import require_decoder, require_ranks, require_student
from regate_ds.recipe.config.sections import ParallelConfig
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.engines.megatron.padding import windows
from regate_ds.recipe.estimate.plan_walk import data_ranks_of
from tests.support.batches import random_batch

CONFIG = """
model: {path: student}
data: {train: train.json}
teacher: {store: reference}
run: {steps: 10, out: run, accumulation: 4}
"""

TEXT: dict[str, Any] = {
    "model_type": "llama",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "hidden_act": "silu",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 400,
}


@pytest.mark.parametrize(
    ("parallel", "others", "message"),
    [
        ("tensor: 0", (), "parallel.tensor=0: must be at least 1"),
        ("context: 0", (), "parallel.context=0: must be at least 1"),
        ("virtual: 2", (), "parallel.virtual=2: needs parallel.pipeline above 1"),
        ("sequence: true", (), "parallel.sequence=True: needs parallel.tensor above 1"),
        ("row_format: thd", (), "parallel.row_format='thd': must be one of padded, ragged"),
        ("experts: 2", (), "parallel.experts=2: unknown key; did you mean parallel.expert"),
        ("expert: 0", (), "parallel.expert=0: must be at least 1"),
        (
            "tensor: 2",
            ("teacher.mode=online", "teacher.sharding=zero3"),
            "teacher.sharding=zero3 cannot be .* set it to none while teacher.mode=online",
        ),
        (
            "tensor: 2",
            ("data.pack_length=4096",),
            "data.pack_length=4096 needs parallel.row_format=ragged, .* data.pack_length to null",
        ),
        ("tensor: 2", ("run.deepspeed={}",), "run.deepspeed={} cannot be .* set it to null"),
        (
            "tensor: 2",
            ("model.gradient_checkpointing=true",),
            "model.gradient_checkpointing=True .* parallel.recompute to full",
        ),
        (
            "pipeline: 2, virtual: 2",
            ("elision.last_layer=3",),
            "elision.last_layer=3 cannot be combined with parallel.virtual=2; set it to null",
        ),
        (
            "pipeline: 3, virtual: 2",
            (),
            "run.accumulation=4: with parallel.virtual=2 it must be a multiple of .*pipeline=3",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(tmp_path, parallel, others, message):
    (tmp_path / "run.yaml").write_text(CONFIG)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "run.yaml", [f"parallel={{{parallel}}}", *others])


def test_experts_must_be_shared_by_ranks_of_a_stage():
    require_ranks(ParallelConfig(pipeline=2, expert=4), 8)
    with pytest.raises(ValueError, match="expert=4 must divide .* has 6; set it to a divisor"):
        require_ranks(ParallelConfig(pipeline=2, expert=4), 12)


@pytest.mark.parametrize(
    ("change", "parallel", "message"),
    [
        ({"num_local_experts": 0}, {"expert": 2}, "expert=2: .* decoder 'mixtral' has no experts"),
        ({}, {"expert": 3}, "4 experts cannot be shared by .*expert=3 ranks; .* a divisor of 4"),
        ({}, {"tensor": 2}, "tensor=2: a student with experts .* set parallel.sequence=true"),
        ({"sliding_window": 8}, {}, "sliding_window=8 in the decoder's config"),
        ({"output_router_logits": True}, {}, "output_router_logits=True asks .* set it false"),
        ({"num_experts_per_tok": 1}, {}, "num_experts_per_tok=1 is not supported"),
        ({"router_jitter_noise": 0.1}, {}, "router_jitter_noise=0.1 .* set it to 0"),
        ({"decoder_sparse_step": 2}, {}, "decoder_sparse_step=2 .* leaves layers without experts"),
        ({"mlp_only_layers": [1]}, {}, r"mlp_only_layers=\[1\] leaves layers without experts"),
        (
            {"moe_intermediate_size": 33},
            {"tensor": 2, "sequence": True},
            "moe_intermediate_size=33 cannot be cut over .*tensor=2",
        ),
    ],
)
def test_a_student_with_experts_that_does_not_fit_is_refused(change, parallel, message):
    text = {**TEXT, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    fits = ParallelConfig(tensor=2, sequence=True, expert=2)
    require_student("llava", SimpleNamespace(**text), fits)
    with pytest.raises(ValueError, match=message):
        require_student("llava", SimpleNamespace(**text | change), ParallelConfig(**parallel))


def test_a_job_must_hold_whole_copies_of_the_model():
    require_ranks(ParallelConfig(tensor=2, pipeline=2), 8)
    require_ranks(ParallelConfig(tensor=2, context=2, pipeline=2), 8)
    with pytest.raises(ValueError, match="is 4 ranks .* the job has 6; .* a multiple of 4"):
        require_ranks(ParallelConfig(tensor=2, pipeline=2), 6)


@pytest.mark.parametrize(
    ("missing", "parallel", "message"),
    [
        ("megatron", {}, "megatron-core is not installed; pip install"),
        (
            "transformer_engine",
            {"row_format": "ragged"},
            "row_format=ragged: .* set parallel.row_format=padded",
        ),
        ("transformer_engine", {"context": 2}, "context=2: .* set parallel.context=1"),
    ],
)
def test_what_is_not_installed_is_named(monkeypatch, missing, parallel, message):
    monkeypatch.setattr(megatron_limits, "is_installed", lambda package: package != missing)
    with pytest.raises(ValueError, match=message):
        megatron_limits.require_packages(ParallelConfig(**parallel))
    monkeypatch.setattr(megatron_limits, "is_installed", lambda _: True)
    megatron_limits.require_packages(ParallelConfig(**parallel))


def test_without_a_gpu_the_way_out_is_named(monkeypatch):
    pytest.importorskip("megatron.core", reason="pip install 'regate-ds[megatron]'")
    from regate_ds.recipe.engines.megatron.groups import require_device

    def none():
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.cuda, "current_device", none)
    with pytest.raises(ValueError, match="needs a GPU, .* set parallel=null to train on CPUs"):
        require_device()


@pytest.mark.parametrize(
    ("change", "parallel", "message"),
    [
        ({}, ParallelConfig(pipeline=3), "4 layers cannot be cut into 3 equal parts"),
        ({}, ParallelConfig(pipeline=4, virtual=2), "cut into 8 equal parts"),
        ({}, ParallelConfig(tensor=4), "num_key_value_heads=2 cannot be cut over .*tensor=4"),
        ({"vocab_size": 401}, ParallelConfig(tensor=2), "vocab_size=401 cannot be cut"),
        ({"model_type": "mistral"}, ParallelConfig(), "decoder 'mistral' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, ParallelConfig(), "rope_type='yarn'"),
        ({"attention_bias": True}, ParallelConfig(), "attention_bias=True in the decoder"),
        ({"hidden_act": "gelu"}, ParallelConfig(), "hidden_act='gelu' is not supported"),
    ],
)
def test_a_student_that_does_not_fit_is_refused(change, parallel, message):
    require_student("llava", SimpleNamespace(**TEXT), ParallelConfig(tensor=2, pipeline=2))
    with pytest.raises(ValueError, match=message):
        require_student("llava", SimpleNamespace(**TEXT | change), parallel)


def test_other_students_than_llava_are_refused():
    with pytest.raises(ValueError, match="a qwen2_vl student cannot be trained with parallel"):
        require_student("qwen2_vl", SimpleNamespace(**TEXT), ParallelConfig())


def test_a_qwen2_decoder_fits():
    require_decoder(SimpleNamespace(**TEXT | {"model_type": "qwen2", "use_sliding_window": False}))


@pytest.mark.parametrize(("parallel", "size"), [(None, 8), (ParallelConfig(tensor=4), 2)])
def test_a_plan_is_walked_for_the_data_ranks(parallel, size):
    assert data_ranks_of(parallel, 8) == size


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (SequenceCut(1, 4), [(5, 3, 7, 1), (4, 2, 2, 6, 2)]),
        (SequenceCut(2, 1), [(8, 4, 8), (4, 4, 4, 8)]),
        (SequenceCut(2, 2), [(8, 4, 8, 4), (4, 4, 4, 8, 4)]),
    ],
)
def test_packed_samples_of_a_window_lie_in_one_row_each_within_its_bounds(cut, expected):
    batches = []
    for lengths in ([[5, 3], [7]], [[4], [2, 2, 6]]):
        ids_BT, tokens = random_batch(lengths, seed=1)
        tokens = replace(tokens, image_BT=tokens.segment_BT)
        inputs = {"input_ids": ids_BT, "position_ids": ids_BT, "pixel_values": torch.ones(2)}
        batches.append(Batch(inputs, tokens))
    (found,) = windows(iter(batches), 2, pad_id=3, cut=cut, packs=True)
    assert [batch.inputs["lengths"] for batch in found] == expected
    for before, after in zip(batches, found, strict=True):
        assert after.tokens.keys == (tuple(before.tokens.flat_keys),)
        assert "position_ids" not in after.inputs
        assert after.inputs["pixel_values"] is before.inputs["pixel_values"]
        (ids_T,), (segment_T,) = after.inputs["input_ids"], after.tokens.segment_BT
        assert bool((ids_T[segment_T < 0] == 3).all())
        for number in range(len(before.tokens.flat_keys)):
            was_BT, is_T = before.tokens.sample_BT == number, segment_T == number
            assert int(is_T.nonzero()[0]) == sum(after.inputs["lengths"][:number])
            assert torch.equal(ids_T[is_T], before.inputs["input_ids"][was_BT])
            assert torch.equal(after.tokens.labels_BT[0, is_T], before.tokens.labels_BT[was_BT])
            assert torch.equal(after.tokens.image_BT[0, is_T], before.tokens.image_BT[was_BT])


def test_a_windows_rows_get_one_length_that_can_be_cut():
    batches = []
    for lengths in ([[5], [7]], [[9], [3]], [[4], [4]], [[6], [2]]):
        ids_BT, tokens = random_batch(lengths, seed=1)
        if len(batches) % 2 == 0:
            tokens = replace(tokens, image_BT=tokens.segment_BT)
        batches.append(Batch({"input_ids": ids_BT, "pixel_values": torch.ones(2)}, tokens))
    found = list(windows(iter(batches), 2, pad_id=3, cut=SequenceCut(2)))
    assert [[b.inputs["input_ids"].shape[1] for b in window] for window in found] == [
        [12, 12],
        [8, 8],
    ]
    for before, after in zip(batches, [b for window in found for b in window], strict=True):
        length = before.tokens.segment_BT.shape[1]
        assert torch.equal(after.inputs["input_ids"][:, :length], before.inputs["input_ids"])
        assert (after.inputs["input_ids"][:, length:] == 3).all()
        assert torch.equal(after.tokens.segment_BT[:, :length], before.tokens.segment_BT)
        assert (after.tokens.segment_BT[:, length:] == -1).all()
        assert (after.tokens.labels_BT[:, length:] == IGNORE).all()
        assert after.tokens.keys == before.tokens.keys
        image_BT = before.tokens.image_BT
        if image_BT is None:
            assert after.tokens.image_BT is None
        else:
            assert torch.equal(after.tokens.image_BT[:, :length], image_BT)
            assert (after.tokens.image_BT[:, length:] == -1).all()
        assert after.inputs["pixel_values"] is before.inputs["pixel_values"]
