"""Read Megatron's data as the method needs it: numbered samples, and labels of all positions.

Megatron's data sets shift the labels themselves: ``labels[t]`` is the token at t+1, and it is a
target where ``loss_mask[t]`` is above 0.

Shapes: B rows of one sample each, T positions that the decoder sees, S tokens before images are
expanded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from regate_ds.algorithm.batch import IGNORE, TokenBatch, number_runs
from regate_ds.data.keyed import KEY


@dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """How LLaVAModel makes room for images: each placeholder token becomes several positions."""

    placeholder: int
    """Token id that stands for an image (-200 in Megatron)."""

    num_positions: int
    """Number of embeddings of an image."""

    max_length: int | None = None
    """The model's language_max_sequence_length, to which longer rows are shortened."""

    pads: bool = False
    """Whether rows are padded to max_length, as LLaVAModel does with pipeline parallelism."""

    def __post_init__(self) -> None:
        if self.pads and self.max_length is None:
            raise ValueError(
                "pads=True, but max_length=None; set max_length to the length of padded rows"
            )


@dataclass(frozen=True)
class RepeatedTokens:
    """A model whose rows have a token for each embedding of an image, as Qwen-VL's have."""

    ids: tuple[int, ...]
    """The ids of these tokens: those of images, of videos."""


def read_tokens(
    item: Mapping[str, Any], *, image: ImageTokens | RepeatedTokens | None = None
) -> TokenBatch:
    """Read a micro-batch of Megatron's or of Megatron-Bridge's loader.

    Positions after a sample's last target count as padding, because no loss depends on them.

    ValueError names what the micro-batch lacks, or what it has that the method cannot honour.
    """
    missing = [name for name in ("labels", "loss_mask", KEY) if name not in item]
    if missing:
        raise ValueError(
            f"a batch has no {', '.join(missing)}; wrap the data set in Keyed, or give "
            "`tokens` to attach"
        )
    packed = [name for name in _BOUNDS if item.get(name) is not None]
    if packed:
        raise ValueError(
            f"a batch has {packed[0]}, so its rows hold several samples, whose keys Megatron does "
            "not pass on; give `tokens` to attach, or one sample a row"
        )
    mask_BT = item["loss_mask"].cpu()
    weights = mask_BT[(mask_BT != 0) & (mask_BT != 1)]
    if len(weights) > 0:
        raise ValueError(
            f"a batch's loss_mask weighs targets (it has the value {float(weights[0])}), but here "
            "every target counts alike; use only the values 0 and 1"
        )
    labels_BT = item["labels"].long().cpu()
    labels_BT = labels_BT.masked_fill(mask_BT == 0, IGNORE)
    if item.get("attention_mask") is not None:
        _require_causal(item["attention_mask"].cpu(), _is_used(labels_BT))
    image_BT = None
    if isinstance(image, RepeatedTokens):
        # Images of Qwen-VL never touch, as each has tokens around it.
        image_BT = number_runs(torch.isin(_ids_of(item), torch.tensor(image.ids)))
    elif image is not None:
        ids_BS = _ids_of(item)
        labels_BT = with_images(labels_BT, ids_BS, image)
        image_BT = image_numbers(ids_BS, image, labels_BT.shape[1])
    names, numbers = item[KEY]
    keys = tuple((key,) for key in zip(names, numbers.tolist(), strict=True))
    return TokenBatch(keys, torch.where(_is_used(labels_BT), 0, -1), labels_BT, image_BT)


_BOUNDS = ("cu_seqlens", "cu_lengths", "cu_seqlens_q")
"""Names under which hosts give the bounds of samples in packed rows."""


def _ids_of(item: Mapping[str, Any]) -> Tensor:
    """Return the token ids of a batch; Megatron-Bridge also calls them as Hugging Face does."""
    return item["tokens" if item.get("tokens") is not None else "input_ids"].cpu()


def _is_used(labels_BT: Tensor) -> Tensor:
    """Return True where a target is at the position or to its right.

    The first position is always True, so that a row without targets is not empty.
    """
    is_used_BT = (labels_BT != IGNORE).flip(1).cumsum(1).flip(1) > 0
    is_used_BT[:, 0] = True
    return is_used_BT


def _require_causal(mask_B1TT: Tensor, is_used_BT: Tensor) -> None:
    """Refuse an attention mask (True hides) that is not causal, as gated layers do not use it."""
    hides_BTT = mask_B1TT[:, 0].expand(len(is_used_BT), -1, -1)
    is_wrong_BTT = hides_BTT != torch.ones_like(hides_BTT[0]).triu(1)
    if bool(is_wrong_BTT[is_used_BT].any()):
        raise ValueError(
            "a batch's attention_mask is not causal order alone, but gated layers use only causal "
            "order; leave the mask out (no --reset-attention-mask), or give `tokens` and "
            "row_format='ragged' to attach"
        )


def with_images(labels_BS: Tensor, ids_BS: Tensor, image: ImageTokens) -> Tensor:
    """Return the labels [B, T] of the positions that the decoder sees.

    As in LLaVAModel, an image's positions and the position before it have no target.
    """
    is_image_BS = ids_BS == image.placeholder
    length_BS = torch.where(is_image_BS, image.num_positions, 1)
    longest = int(length_BS.sum(1).max())
    limit = longest if image.max_length is None else image.max_length
    labels_BT = labels_BS.new_full((len(labels_BS), max(limit, longest)), IGNORE)
    has_no_target_BS = is_image_BS | _shifted_left(is_image_BS)
    labels_BT.scatter_(1, length_BS.cumsum(1) - 1, labels_BS.masked_fill(has_no_target_BS, IGNORE))
    return labels_BT[:, : limit if image.pads else min(limit, longest)]


def image_numbers(ids_BS: Tensor, image: ImageTokens, num_positions: int) -> Tensor:
    """Number the images of each row: at their positions among ``num_positions`` (T), else -1."""
    is_image_BS = ids_BS == image.placeholder
    end_BS = torch.where(is_image_BS, image.num_positions, 1).cumsum(1)
    position_BT = torch.arange(num_positions).expand(len(ids_BS), -1).contiguous()
    # A position belongs to the first token whose end lies behind it; what is padded on, to none.
    token_BT = torch.searchsorted(end_BS, position_BT, right=True)
    number_BS = (is_image_BS.long().cumsum(1) - 1).masked_fill(~is_image_BS, -1)
    return torch.nn.functional.pad(number_BS, (0, 1), value=-1).gather(1, token_BT)


class TeacherItems(Dataset[dict[str, Any]]):
    """The same samples for the teacher's job, with the names of inputs that Hugging Face uses.

    A data set with a ``collate_fn`` of its own, as Megatron-Bridge's have, says by it what a sample
    is. Give ``Keyed(TeacherItems(dataset), name)`` and ``teacher_batch`` to ``score_dataset``.
    """

    def __init__(self, dataset: Any, image: ImageTokens | None = None) -> None:
        self._dataset, self._image = dataset, image

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        item = self._dataset[number]
        if (collate := getattr(self._dataset, "collate_fn", None)) is not None:
            batch = collate([item])
            item = {"tokens": _ids_of(batch)[0]} | {k: batch[k][0] for k in ("labels", "loss_mask")}
        ids_S, labels_S = (torch.as_tensor(item[name]).long() for name in ("tokens", "labels"))
        labels_S = labels_S.masked_fill(torch.as_tensor(item["loss_mask"]) <= 0, IGNORE)
        if self._image is not None:
            length_S = torch.where(ids_S == self._image.placeholder, self._image.num_positions, 1)
            labels_S = with_images(labels_S[None], ids_S[None], self._image)[0]
            ids_S = ids_S.repeat_interleave(length_S)
        targets = (labels_S != IGNORE).nonzero().squeeze(1)
        num_used = int(targets[-1]) + 1 if len(targets) else 1
        # Hugging Face shifts labels itself, so the shift is undone: the last target becomes one
        # more token, which nothing attends to.
        labels = torch.nn.functional.pad(labels_S[:num_used], (1, 0), value=IGNORE)
        ids = torch.cat([ids_S[:num_used], labels[-1:].clamp(min=0)])
        mask = torch.ones_like(ids).index_fill(0, torch.tensor(num_used), 0)
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def teacher_batch(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Collate a list of one item, as the teacher's job reads sample by sample."""
    (item,) = items
    return {name: value[None] for name, value in item.items() if isinstance(value, Tensor)}


def _shifted_left(is_image: Tensor) -> Tensor:
    """Return True at each position whose next position, in the last dim, is True."""
    return torch.nn.functional.pad(is_image[..., 1:], (0, 1))
