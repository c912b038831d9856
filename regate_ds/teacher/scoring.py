"""Score samples with the teacher, which reads their text with a plain token at image positions.

Shapes: B samples, T positions of the longest, S positions of one sample, H hidden, N label
positions of all samples, sample by sample.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from regate_ds.algorithm.batch import IGNORE, SampleKey
from regate_ds.teacher.head_loss import IDS, HeadPart
from regate_ds.teacher.logits import logit_change

logger = logging.getLogger(__name__)


class ScoredSample(Protocol):
    """What the teacher needs to know of a sample, such as an ``EncodedSample``."""

    @property
    def key(self) -> SampleKey: ...

    @property
    def input_ids_S(self) -> Tensor: ...

    @property
    def labels_S(self) -> Tensor:
        """int64: the token at t+1 where it belongs to an answer, else IGNORE."""
        ...

    @property
    def is_placeholder_S(self) -> Tensor: ...


class TeacherInputs(NamedTuple):
    """The right-padded model inputs of one batch."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    """int64: 1 at every position of a sample, 0 at batch padding."""

    position_ids_BT: Tensor

    def named(self) -> dict[str, Tensor]:
        """Return them by the names that models of transformers have for them."""
        return {
            "input_ids": self.input_ids_BT,
            "attention_mask": self.attention_mask_BT,
            "position_ids": self.position_ids_BT,
        }


def teacher_inputs(
    input_ids: Sequence[Tensor], is_placeholder: Sequence[Tensor], pad_id: int
) -> TeacherInputs:
    """Make the inputs of a batch: ``pad_id`` replaces image placeholders, and is attended to.

    ``input_ids`` and ``is_placeholder`` hold one tensor [S] for each sample; positions are 0..S-1.
    """
    lengths = [ids_S.numel() for ids_S in input_ids]
    ids_BT = torch.full((len(lengths), max(lengths)), pad_id, dtype=torch.int64)
    # The mask follows from the lengths, not from the pad id, which images have and eos may be.
    mask_BT = torch.zeros_like(ids_BT)
    for row, (ids_S, is_placeholder_S) in enumerate(zip(input_ids, is_placeholder, strict=True)):
        ids_BT[row, : lengths[row]] = ids_S.masked_fill(is_placeholder_S, pad_id)
        mask_BT[row, : lengths[row]] = 1
    positions_BT = torch.arange(max(lengths)).expand_as(ids_BT)
    return TeacherInputs(ids_BT, mask_BT, positions_BT)


@torch.inference_mode()
def score_samples(
    teacher: nn.Module, samples: Sequence[ScoredSample], *, pad_id: int, num_ids: int = IDS
) -> Tensor:
    """Return the teacher's negative log-likelihood of every label in nats: fp32 [N] on the CPU.

    ``teacher`` is a causal LM with a decoder ``model`` and an ``lm_head``, or this rank's part of
    one. Only label positions go through the head, in blocks of ``num_ids`` ids, so that logits
    [B, T, V] never exist. ValueError for a teacher that is built otherwise, or for a token id that
    it does not have.
    """
    _require_plain_head(teacher)
    num_embeddings = teacher.get_input_embeddings().num_embeddings  # type: ignore[operator]
    for sample in samples:
        text_ids = sample.input_ids_S[~sample.is_placeholder_S]
        require_ids_fit(text_ids.tolist(), num_embeddings, ())
    require_ids_fit([pad_id], num_embeddings, ())
    inputs = teacher_inputs(
        [sample.input_ids_S for sample in samples],
        [sample.is_placeholder_S for sample in samples],
        pad_id,
    )
    hidden_BTH = _run_decoder(teacher, inputs)
    labels = [sample.labels_S for sample in samples]
    labels_BT = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE)
    is_label_BT = labels_BT != IGNORE
    hidden_NH = hidden_BTH[is_label_BT.to(hidden_BTH.device)]
    labels_N = labels_BT[is_label_BT].to(hidden_BTH.device)
    head: Any = teacher.lm_head
    part = head if isinstance(head, HeadPart) else HeadPart(head, change=logit_change(teacher))
    return part.losses(hidden_NH, labels_N, num_ids).cpu()


def require_ids_fit(
    ids: Iterable[int], num_embeddings: int, placeholder_ids: Iterable[int]
) -> None:
    """Refuse, by ``ValueError`` naming it, an id that the teacher has no embedding row for."""
    beyond = {number for number in ids if number >= num_embeddings} - set(placeholder_ids)
    if beyond:
        raise ValueError(
            f"token id {min(beyond)} is beyond the teacher's {num_embeddings} embedding rows; "
            "use a teacher whose vocabulary covers the student's text"
        )


def _run_decoder(teacher: nn.Module, inputs: TeacherInputs) -> Tensor:
    device = next(teacher.parameters()).device
    given = {name: value_BT.to(device) for name, value_BT in inputs.named().items()}
    output = teacher.model(**given, use_cache=False)  # type: ignore[operator]
    return output.last_hidden_state


def _require_plain_head(teacher: nn.Module) -> None:
    if not (hasattr(teacher, "model") and hasattr(teacher, "lm_head")):
        raise ValueError(
            f"the teacher is a {type(teacher).__name__}, without a decoder `model` and an "
            "`lm_head`; use a teacher built like Llama, Mistral or Qwen2"
        )
    if type(teacher.lm_head) is not nn.Linear and not isinstance(teacher.lm_head, HeadPart):
        raise ValueError(
            f"the teacher's lm_head is a {type(teacher.lm_head).__name__}, not a plain linear "
            "layer; use a teacher whose head is neither quantised nor adapted"
        )
