"""What the benchmarks share: sizes of a Llama, its samples, and timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.llava.sample import EncodedSample


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a Llama decoder, of its samples, whose every position is a label, and of a run."""

    hidden: int = 512
    num_layers: int = 4
    vocabulary: int
    num_samples: int
    num_tokens: int
    num_pairs: int
    num_threads: int = 1

    def llama(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 8 // 3,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 64,
            max_position_embeddings=self.num_tokens,
        )

    def ids(self) -> Tensor:
        """Return random token ids, int64 [samples, tokens]."""
        return torch.randint(self.vocabulary, (self.num_samples, self.num_tokens))


def text_sample(number: int, ids_S: Tensor) -> EncodedSample:
    labels_S = ids_S.roll(-1)
    labels_S[-1] = IGNORE
    no_image_S = torch.full_like(ids_S, -1)
    return EncodedSample(("bench", number), ids_S, labels_S, no_image_S, char_spans=(), images=())


def interleaved(steps: Mapping[str, Callable[[], Any]], num_pairs: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each kind of step, which take turns, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(num_pairs + 1):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            if number > 0:
                seconds[name].append(time.process_time() - begin)
    return seconds
