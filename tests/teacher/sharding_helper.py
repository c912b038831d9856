"""Sharded teachers against the whole one in one process; many cases in one process group."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from regate_ds.data.keyed import Keyed, KeyedCollate
from regate_ds.job.process import Process, start_process
from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.teacher.api import Teacher, open_teacher, score_dataset
from regate_ds.teacher.backbone import text_backbone
from regate_ds.teacher.config import TeacherConfig
from regate_ds.teacher.head_loss import HeadPart
from regate_ds.teacher.host_text import HostText
from regate_ds.teacher.identity import teacher_id
from regate_ds.teacher.loading import load_teacher
from regate_ds.teacher.precompute import ScoreSamples, TeacherJob, precompute
from regate_ds.teacher.scoring import ScoredSample, score_samples
from regate_ds.teacher.sharding.placement import PlacedTeacher, TeacherSource, place_teacher
from regate_ds.teacher.sharding.tensor_parallel import ShardedTeacher, require_share
from tests.adapters.deepspeed.zero_checks_helper import run_named
from tests.families.zoo.models.table import FAMILIES
from tests.support.models import causal_lm
from tests.support.samples import make_samples
from tests.teacher.reference_job_helper import NUM_SAMPLES, files_of, make_job
from tests.teacher.test_api import IMAGE, collate, host_items

PAD = 1

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"kind": "qwen2"},
    "mistral": {"kind": "mistral"},
    "nine heads, three of them key-value": {"heads": (9, 3), "hidden_size": 72},
    "biases and wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "nine heads, tied": {"heads": (9, 3), "hidden_size": 72, "tie_word_embeddings": True},
}

TENSOR, ZERO3 = TeacherConfig(sharding="tensor", tensor=2), TeacherConfig(sharding="zero3")

HALF = "bf16"
"""A Llama in that format."""

LARGE = "large"
"""Its weights are many times what the process needs beside them."""


def save_models(folder: Path) -> None:
    """What the ranks read."""
    for name, sizes in MODELS.items():
        model = causal_lm(**sizes)
        for weight_name, weight in model.named_parameters():
            if weight_name.endswith("bias"):
                nn.init.normal_(weight)
        model.save_pretrained(folder / name)
    causal_lm().bfloat16().save_pretrained(folder / HALF)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder / LARGE, max_shard_size="40MB")


def source(folder: Path, *, whole: bool = False) -> TeacherSource:
    config = AutoConfig.from_pretrained(folder)
    return TeacherSource(config, partial(load_teacher, folder), None if whole else folder)


def check_losses(
    process: Process, section: TeacherConfig, source: TeacherSource, tolerance: float = 1e-5
) -> PlacedTeacher:
    """Each replica scores samples of its own; all of it as the whole teacher does.

    tolerance: of sums over two ranks' parts in fp32.
    """
    whole, before = source.load(), torch.get_rng_state()
    placed = place_teacher(section, source, PAD, process)
    assert torch.equal(torch.get_rng_state(), before)
    assert placed.id == teacher_id(whole, pad_id=PAD)
    replica = process.rank // placed.ranks_per_replica
    for first in (replica, 2 + replica):
        samples = make_samples(8)[first : first + 3 + replica]
        wanted_N = score_samples(whole, samples, pad_id=PAD)
        found_N = score_samples(placed.model, samples, pad_id=PAD, num_ids=7)
        torch.testing.assert_close(found_N, wanted_N, rtol=tolerance, atol=tolerance)
    table = placed.model.model.rotary_emb.inv_freq
    assert torch.equal(table, whole.model.rotary_emb.inv_freq)
    assert table.dtype == torch.float32
    return placed


def check_pieces(placed: PlacedTeacher, world_size: int) -> None:
    """At rest a rank holds its piece and nothing else."""
    for _, module, name in placed.model.weights_by_name():
        parameter = module.get_parameter(name)
        assert parameter.numel() == 0
        assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // world_size)


def check_store(process: Process, models: Path) -> None:
    placed = place_teacher(TENSOR, source(models / "llama"), PAD, process)
    precompute(_tensor_job(models / "tensor store", placed), process.group)


def check_resumed(process: Process, models: Path) -> None:
    """Begun by two replicas and ended by one of them, and the other way round, a store has the
    files of ``check_store``."""
    placed = place_teacher(TENSOR, source(models / "llama"), PAD, process)
    both, one = process.group, placed.layout.replica if process.rank < 2 else None
    for begin, end in ((both, one), (one, both)):
        store = models / f"begun by {'two' if begin is both else 'one'}"
        job = _tensor_job(store, placed)
        num_shards = len(files_of(models / "tensor store")) - 3
        if begin is not None:
            with pytest.raises(RuntimeError, match="ended here"):
                precompute(replace(job, score=_ends_after(3, job.score)), begin)
        dist.barrier()
        assert 0 < len(list(store.glob("shard-*"))) < num_shards
        if end is not None:
            precompute(job, end)
        dist.barrier()
        assert files_of(store) == files_of(models / "tensor store")


def _tensor_job(store: Path, placed: PlacedTeacher) -> TeacherJob:
    return make_job(
        store,
        score=partial(score_samples, placed.model, pad_id=PAD),
        teacher_id=placed.id,
        ranks_per_replica=placed.ranks_per_replica,
    )


def _ends_after(num_batches: int, score: ScoreSamples) -> ScoreSamples:
    left = iter(range(num_batches))

    def scored(samples: Sequence[ScoredSample]) -> torch.Tensor:
        if next(left, None) is None:
            raise RuntimeError("ended here")
        return score(samples)

    return scored


def check_own_data(process: Process, models: Path, *, section: TeacherConfig) -> None:
    """The store of a user's data set has the whole teacher's losses, shared by all ranks."""
    data = Keyed(host_items(9), "set")
    whole = Teacher(model=load_teacher(models / "llama"), pad_id=PAD, image_token_id=IMAGE)
    section = replace(section, path=models / "llama", tokens_per_batch=64)
    parted = open_teacher(section, pad_id=PAD, image_token_id=IMAGE)
    assert parted.id == whole.id
    values = []
    for teacher, kind in ((whole, "whole"), (parted, "parted")):
        path = models / f"own data, {section.sharding}, {kind}"
        score_dataset(data, collate, teacher, path, process.group)
        store = ReferenceStore(path)
        values.append(store.read(store.index.keys))
    torch.testing.assert_close(*values, rtol=2**-10, atol=1e-5)
    mine = [process.rank, 8]
    online = parted.online()
    online.prepare([KeyedCollate(collate)([data[number] for number in mine])])
    keys = [("set", number) for number in mine]
    torch.testing.assert_close(online.read(keys), store.read(keys), rtol=2**-10, atol=1e-5)
    other, path = replace(whole, name=f"of {process.rank}"), models / "no store"
    with pytest.raises(RuntimeError, match=r"and teacher of \d, other ranks have not"):
        score_dataset(data, collate, other, path, process.group)
    with pytest.raises(ValueError, match=r"this job has \d ranks: give score_dataset the group"):
        score_dataset(data, collate, whole, path)
    with pytest.raises(ValueError, match="ranks of the job hold this teacher together"):
        score_dataset(
            data,
            collate,
            parted,
            path,
            dist.new_group([process.rank], use_local_synchronization=True),
        )
    assert not path.exists()


def check_zero3_store(process: Process, models: Path) -> None:
    """An odd number of batches: one rank has to keep up with the other."""
    placed = place_teacher(ZERO3, source(models / "llama"), PAD, process)
    job = make_job(
        models / "zero3 store",
        tokens_per_batch=30,
        score=partial(score_samples, placed.model, pad_id=PAD),
        teacher_id=placed.id,
        in_step=placed.in_step,
    )
    assert len(job.batches(np.arange(NUM_SAMPLES))) % 2 == 1
    precompute(job, process.group)


def check_turns(process: Process, models: Path) -> None:
    """What is loaded whole, as a GGUF file is, is loaded by one rank of a node at a time."""
    overlaps, here = [], models / "a rank loads"

    def load():
        try:
            here.mkdir()
        except FileExistsError:
            overlaps.append(process.rank)
        time.sleep(0.2)
        model = load_teacher(models / "llama")
        here.rmdir()
        return model

    config = AutoConfig.from_pretrained(models / "llama")
    for section in (TeacherConfig(), TENSOR):
        place_teacher(section, TeacherSource(config, load), PAD, process)
        assert not overlaps


def check_whole_is_too_much(process: Process, models: Path) -> None:
    """What DeepSpeed has not cut, without a word, is refused."""
    whole = causal_lm()
    sizes = {name: value.numel() for name, value in whole.model.named_parameters()}
    uncut = ShardedTeacher(whole.config, whole.model, HeadPart(whole.lm_head))
    with pytest.raises(RuntimeError, match=r"rank \d of 2 holds 27168 parameters .* not cut them"):
        require_share(uncut, sizes, process.group)


_M_MMAP_THRESHOLD = -3
"""Of glibc: from which size on memory is a mapping of its own."""


def check_memory(process: Process, models: Path, *, section: TeacherConfig) -> None:
    """No rank ever holds the full model, neither at rest nor while it reads."""
    folder = models / LARGE
    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    embedding = 2048 * 512
    rest = sum(value.numel() for value in model.parameters())  # The head is as large as this one.
    # Larger tensors are given back when they are freed. Else what the allocator keeps hides a
    # tensor, or seems to be one.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 18)
    ctypes.CDLL(None).malloc_trim(0)
    before = _reset_peak()
    place_teacher(section, source(folder), PAD, process)
    grown, whole = _peak() - before, 4 * (embedding + rest)
    # The embedding is whole, of the rest there is a half; one tensor, and what is not of the model.
    allowed = 4 * (embedding + rest / 2) + 4 * 512 * 2048 + 0.1 * whole
    print(f"{section.sharding}: rank {process.rank} grew by {grown} of {whole}", flush=True)
    assert grown < allowed < 0.8 * whole


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """Largest resident memory since the reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


def check_pieces_score(process: Process, source: TeacherSource) -> None:
    check_pieces(check_losses(process, ZERO3, source), process.world_size)


def check_host_text(process: Process, models: Path) -> None:
    """A decoder whose host scales nothing, though its causal language model does."""
    torch.manual_seed(0)
    view: Any = text_backbone(
        LlavaForConditionalGeneration(FAMILIES["llava over granite"].config())
    )
    assert isinstance(view, HostText)
    check_pieces_score(process, TeacherSource(view.config, lambda: view, empty=view.empty))


Check = Callable[[Process, Path], object]
"""A check of one process, which gets the folder of the models."""


def _checks(kind: str, check: Callable[[Process, TeacherSource], object], whole: bool) -> dict:
    return {
        f"{kind}: {name}": lambda process, models, name=name: check(
            process, source(models / name, whole=whole)
        )
        for name in MODELS
    }


def check_cut(process: Process, source: TeacherSource) -> None:
    check_losses(process, TENSOR, source)


FOUR: dict[str, Check] = {
    **_checks("tensor", check_cut, whole=False),
    "store": check_store,
    "resumed": check_resumed,
    "own data": partial(check_own_data, section=TENSOR),
}


def check_half(process: Process, models: Path) -> None:
    # Two ranks' parts are rounded to bf16 before they are added, in each of three layers.
    check_losses(process, TENSOR, source(models / HALF), tolerance=2e-2)
    check_losses(process, ZERO3, source(models / HALF))


TWO: dict[str, Check] = {
    "bf16": check_half,
    **_checks("tensor", check_cut, whole=True),
    **_checks("zero3", check_pieces_score, whole=False),
    "zero3: a host's own text": check_host_text,
    "zero3 store": check_zero3_store,
    "zero3 own data": partial(check_own_data, section=ZERO3),
    "turns": check_turns,
    "too much": check_whole_is_too_much,
    "tensor memory": partial(check_memory, section=TENSOR),
    "zero3 memory": partial(check_memory, section=ZERO3),
}


def check_four(rank: int, folder: str) -> None:
    _run(rank, folder, FOUR)


def check_two(rank: int, folder: str) -> None:
    _run(rank, folder, TWO)


def _run(rank: int, folder: str, checks: dict[str, Check]) -> None:
    process, models = start_process(), Path(folder).parent
    run_named(rank, folder, {n: partial(check, process, models) for n, check in checks.items()})
