"""What `regate bench step` measures: a model's shape, a micro-batch, what is kept, and the host.

    regate bench step configs/bench/step.yaml tokens=2048 image_share=0.8

Each key has a default, so that the file may be left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig

from regate_ds.algorithm.batch import IGNORE, TokenBatch
from regate_ds.data.collate import Batch
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.recipe.bench.harness import text_sample
from regate_ds.recipe.config.tree import read_tree
from regate_ds.settings.refuse import require
from regate_ds.settings.section import read_section
from regate_ds.stores.answer_index import AnswerIndex


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """One benchmark of a step. The decoder is a Llama with random weights."""

    host: Literal["huggingface", "deepspeed_pipeline", "megatron"] = "huggingface"
    """What runs the step."""

    hidden: int = 512
    """Hidden size; heads have 64 values each."""

    inner: int | None = None
    """Inner size of the MLP; null is 8/3 of the hidden size, up to a multiple of 64."""

    kv_heads: int | None = None
    """Heads of keys and values; null is as many as of queries."""

    layers: int = 4
    """Layers of the decoder."""

    vocabulary: int = 8192
    """Tokens of the vocabulary, rows of the head."""

    samples: int = 4
    """Samples of a micro-batch on each data rank, one a row."""

    tokens: int = 512
    """Tokens of a sample: an image first, and answers behind it."""

    micro_batches: int = 1
    """Micro-batches of a step."""

    image_share: float = 0.5
    """Share of a sample's tokens that are of its image."""

    keep_share: float = 0.5
    """Share of the answers that sparse steps keep."""

    image_keep_share: float = 0.5
    """Share of the image tokens that those steps keep which elide images as well."""

    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention of the Hugging Face model, and of its pipeline."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of weights and activations."""

    recompute: bool = False
    """Whether the backward pass computes each layer again (activation checkpointing)."""

    zero_stage: int | None = None
    """ZeRO stage of a DeepSpeed engine around the Hugging Face model; null is no engine."""

    data_ranks: int = 1
    """Ranks that read different samples; above 1 needs a ZeRO stage."""

    pipeline: int = 1
    """Stages of the decoder, each on a rank of its own, under deepspeed_pipeline and megatron."""

    tensor: int = 1
    """Ranks that share each layer's matrices, under megatron."""

    sequence: bool = False
    """Whether those ranks share the activations between the matrices as well."""

    arms: tuple[str, ...] = ()
    """Names of the rows; none is all that the host has."""

    rounds: int = 5
    """Turns of each row that are timed, after one that is not."""

    threads: int = 1
    """Threads of each rank on a CPU."""

    seed: int = 0
    """Seed of weights, tokens and reference losses."""

    def __post_init__(self) -> None:
        for key in ("layers", "vocabulary", "samples", "micro_batches", "data_ranks", "pipeline"):
            require(self, key, getattr(self, key) >= 1, "must be at least 1")
        for key in ("tensor", "rounds", "threads"):
            require(self, key, getattr(self, key) >= 1, "must be at least 1")
        require(self, "tokens", self.tokens >= 4, "must be at least 4")
        fits = self.hidden >= 64 and self.hidden % 64 == 0
        require(self, "hidden", fits, "must be a multiple of 64")
        require(self, "image_share", 0.0 <= self.image_share <= 0.9, "must be from 0 to 0.9")
        for key in ("keep_share", "image_keep_share"):
            require(self, key, 0.0 < getattr(self, key) <= 1.0, "must be above 0 and at most 1")
        stage = self.zero_stage
        require(self, "zero_stage", stage is None or 0 <= stage <= 3, "must be 0 to 3, or null")
        self._require_host()

    def _require_host(self) -> None:
        by_host = {
            "huggingface": ("zero_stage", "data_ranks"),
            "deepspeed_pipeline": ("zero_stage", "pipeline"),
            "megatron": ("tensor", "pipeline", "sequence"),
        }
        defaults = {
            "pipeline": 1,
            "tensor": 1,
            "data_ranks": 1,
            "sequence": False,
            "zero_stage": None,
        }
        for key, default in defaults.items():
            known = key in by_host[self.host] or getattr(self, key) == default
            require(self, key, known, f"host={self.host} has no such axis; leave it out")
        stage, is_pipe = self.zero_stage, self.host == "deepspeed_pipeline"
        require(self, "data_ranks", self.data_ranks == 1 or stage is not None, "needs a zero_stage")
        require(self, "sequence", not self.sequence or self.tensor > 1, "needs tensor above 1")
        stages = self.pipeline >= 2 or not is_pipe
        require(self, "pipeline", stages, "must be at least 2 under deepspeed_pipeline")
        require(self, "zero_stage", not is_pipe or (stage or 0) <= 1, "must be 0 or 1 there")
        even = self.layers % self.pipeline == 0
        require(self, "layers", even, f"must be a multiple of pipeline={self.pipeline}")

    @property
    def world_size(self) -> int:
        return self.data_ranks * self.pipeline * self.tensor

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def llama(self) -> LlamaConfig:
        """Return the decoder's configuration."""
        heads = self.hidden // 64
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner or -(-self.hidden * 8 // 3 // 64) * 64,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=self.kv_heads or heads,
            max_position_embeddings=self.tokens,
            tie_word_embeddings=False,
        )
        config._attn_implementation = self.attention
        return config


def read_case(path: Path | None, overrides: Sequence[str]) -> StepCase:
    """Read a case from a file, if one is given, with ``key=value`` over it.

    ValueError is one line with the file, the key, its value and what is allowed.
    """
    tree = read_tree(path, overrides)
    try:
        return read_section(StepCase, tree, where="")
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from None


@dataclass(frozen=True)
class CaseData:
    """A data rank's micro-batches, and random losses of a teacher in place of a store's files."""

    batches: list[Batch]
    index: AnswerIndex
    values_N: Tensor

    def read(self, keys: Any) -> Tensor:
        return self.values_N[self.index.locate(keys)]


def as_loaded(batches: Sequence[Batch]) -> list[Batch]:
    """Return micro-batches as a loader gives them: nothing has been made of their tokens yet."""
    return [replace(batch, tokens=replace(batch.tokens)) for batch in batches]


def make_data(case: StepCase, data_rank: int = 0) -> CaseData:
    """Make a data rank's batches, and the index of all ranks' samples; the same on every rank."""
    generator = torch.Generator().manual_seed(case.seed)
    per_rank, samples, own = case.micro_batches * case.samples, [], []
    for number in range(case.data_ranks * case.micro_batches):
        ids_BT = torch.randint(case.vocabulary, (case.samples, case.tokens), generator=generator)
        batch, made = _batch(case, number, ids_BT)
        samples += made
        if number * case.samples // per_rank == data_rank:
            own.append(batch)
    index = AnswerIndex.build(samples)
    return CaseData(own, index, torch.rand(index.num_tokens, generator=generator))


def _batch(case: StepCase, number: int, ids_BT: Tensor) -> tuple[Batch, list[EncodedSample]]:
    """Return a micro-batch, the first part of whose rows is an image, and its samples."""
    first = number * case.samples
    made = [text_sample(first + n, ids_S) for n, ids_S in enumerate(ids_BT)]
    image_BT = torch.full_like(ids_BT, -1)
    image_BT[:, : round(case.image_share * case.tokens)] = 0
    labels_BT = torch.stack([one.labels_S for one in made]).masked_fill(image_BT >= 0, IGNORE)
    made = [replace(one, labels_S=row) for one, row in zip(made, labels_BT, strict=True)]
    keys = tuple((one.key,) for one in made)
    tokens = TokenBatch(keys, torch.zeros_like(labels_BT), labels_BT, image_BT)
    return Batch({"input_ids": ids_BT}, tokens), made
