"""One optimizer step of a Megatron-core model under some layout, and its micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regate_ds.algorithm.batch import IGNORE, TokenBatch
from regate_ds.config import RegateConfig
from tests.support.batches import made_up_images, random_batch
from tests.support.planning import config_of

HIDDEN, HEADS, GROUPS, FFN, EXPERTS = 32, 4, 2, 48, 4
VOCABULARY = 64
TOTAL_STEPS = 4

LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
}
"""Sizes of latent attention."""

BRIDGED = ("qwen25_vl", "qwen3_vl")
"""Megatron-Bridge's models; only its own environment has them (tests/adapters/megatron_bridge)."""


@dataclass(frozen=True)
class Case:
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    vpp: int = 1
    sp: bool = False
    row_format: str = "padded"
    first_layer: int = 1
    last_layer: int | None = None
    recompute: str = "none"
    """none, full, selective"""

    model: str = "gpt"
    """gpt, tied, moe, latent (attention as DeepSeek's), llava, around (a model that calls a
    GPTModel as Megatron-Bridge does), or one of BRIDGED"""

    positions: str = "rope"
    """rope, yarn, mrope"""

    num_layers: int = 4
    num_micro: int = 4
    rows: int = 2
    length: int = 24
    packed: bool = False
    """The host's own rows hold several samples (ragged from the first layer on)."""

    execution: str = "elide"
    score: str = "fused"
    quota: str = "per_sample"
    keep_share: float = 0.5
    image_share: float = 1.0
    """Share of each image's tokens that are kept. Below 1 a row of LLaVAModel has two images, and
    the first half of a sample of text is taken for two."""

    dense: bool = False
    merged: int = 0
    """Tokens of a patch in a merged step, behind which another step is tried; 0 for none."""

    token_multiple: int = 1
    seed: int = 0
    one_slice: bool = False
    """Kept label positions are all at the end: in one slice of the sequence."""

    aux: float = 0.0
    """Weight of the experts' auxiliary loss."""

    distributed_optimizer: bool = False

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def own_attention(self) -> bool:
        """Stock attention takes neither packed sequences nor context parallelism."""
        return self.row_format == "ragged" or self.cp > 1 or self.model == "latent"

    @property
    def config(self) -> RegateConfig:
        merge = {"merge": {"size": self.merged, "steps": 1}} if self.merged else {}
        return config_of(
            **merge,
            schedule={"warmup": 1 if self.dense else 0, "final_dense_share": 0.0},
            execution=self.execution,
            score=self.score,
            quota=self.quota,
            keep_share=self.keep_share,
            images={"keep_share": self.image_share},
            first_layer=self.first_layer,
            last_layer=self.last_layer,
            token_multiple=self.token_multiple,
        )

    def __str__(self) -> str:
        default = Case()
        parts = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k)]
        return " ".join(parts) or "one process"


@dataclass(frozen=True)
class Item:
    """What the data iterator yields."""

    ids_BT: Tensor
    tokens: TokenBatch


def items(case: Case, data_rank: int) -> list[Item]:
    """The micro-batches of a data rank; samples of very different lengths."""
    made = []
    for number in range(case.num_micro):
        seed = 1000 * case.seed + 100 * data_rank + number
        generator = torch.Generator().manual_seed(seed)
        lengths = _lengths(case, generator)
        if case.model == "llava":
            from tests.adapters.megatron.llava_helper import image_item

            made.append(_named(image_item(case, lengths, seed), f"rank{data_rank}-{number}"))
            continue
        if case.model in BRIDGED:
            from tests.adapters.megatron_bridge.models_helper import grid_item

            item = grid_item(case, lengths, seed, has_images=number < case.num_micro - 1)
            made.append(_named(item, f"rank{data_rank}-{number}"))
            continue
        ids, tokens = random_batch(lengths, seed=seed, length=case.length)
        if case.packed and case.cp > 1:
            ids, tokens = filled_up(ids, tokens, 2 * case.cp, case.length)
        if case.one_slice:
            labels = tokens.labels_BT.clone()
            labels[:, : case.length * 3 // 4] = IGNORE
            tokens = replace(tokens, labels_BT=labels)
        if case.image_share < 1.0:
            tokens = made_up_images(tokens)
        made.append(_named(Item(ids, tokens), f"rank{data_rank}-{number}"))
    return made


def positions_of(case: Case, item: Item) -> Tensor:
    """Positions [3, B, T] of three axes, which differ from row to row and are no order."""
    num_rows, num_tokens = item.tokens.labels_BT.shape
    where = torch.arange(num_tokens).expand(3, num_rows, -1)
    if case.positions != "mrope":
        return where
    scale = torch.tensor([1, 2, 3])[:, None, None] * (1 + torch.arange(num_rows)[:, None])
    return (7 * where * scale + item.ids_BT) % torch.tensor([11, 13, 17])[:, None, None]


def filled_up(
    ids_1T: Tensor, tokens: TokenBatch, multiple: int, length: int
) -> tuple[Tensor, TokenBatch]:
    """The samples of a packed row, each with padding behind it that makes it a multiple."""
    segment_T, at = tokens.segment_BT[0], []
    for sample in range(len(tokens.keys[0])):
        start = -(-(at[-1] + 1) // multiple) * multiple if at else 0
        at += range(start, start + int((segment_T == sample).sum()))
    where, is_real = torch.tensor(at), segment_T >= 0

    def spread(x_1T: Tensor, value: int) -> Tensor:
        return x_1T.new_full((1, length), value).index_copy(1, where, x_1T[:, is_real])

    segment_1T, labels_1T = spread(tokens.segment_BT, -1), spread(tokens.labels_BT, IGNORE)
    return spread(ids_1T, 0), replace(tokens, segment_BT=segment_1T, labels_BT=labels_1T)


def _named(item: Item, name: str) -> Item:
    """Keys that no other micro-batch has."""
    keys = tuple(tuple((name, i) for _, i in row) for row in item.tokens.keys)
    return replace(item, tokens=replace(item.tokens, keys=keys))


def _lengths(case: Case, generator: torch.Generator) -> list[list[int]]:
    if case.model == "llava" or case.model in BRIDGED:
        # Room for the images in every row.
        sizes = torch.randint(12, case.length + 1, (case.rows,), generator=generator)
        return [[n] for n in sizes.tolist()]
    if case.one_slice:
        return [[case.length]] * case.rows
    if case.packed:
        a, b = torch.randint(3, case.length // 3, (2,), generator=generator).tolist()
        # Where context ranks cut each sample, room is left to fill them up, and for padding behind.
        taken = case.length * 2 // 3 + a % 4 if case.cp > 1 else a + b
        return [[a, b, case.length - taken]]
    return [
        [n] for n in torch.randint(5, case.length + 1, (case.rows,), generator=generator).tolist()
    ]
