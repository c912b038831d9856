"""What an objective is: a helper proposes, the main model judges, losses are summed with a weight.

Shapes: B rows, T tokens, P patches before a row's text, F numbers of a patch.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from regate_ds.algorithm.batch import SampleKey

TermLosses = dict[str, Tensor]
"""Sum of the losses of each term, by its name."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What rows are made of, the same in a whole run."""

    num_tokens: int
    """Rows of the embedding table, added tokens included."""

    pad_id: int
    mask_id: int

    special_ids: tuple[int, ...]
    """Ids that stand for no text: they are neither picked nor proposed. Padding and mask are two of
    them."""

    patch_size: int | None = None
    """Numbers of a patch of the pictures before a text; None where rows are text alone."""


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """The samples of a micro-batch; padding stands behind the text of a row."""

    keys: tuple[SampleKey, ...]
    """The name of each row's sample, which decides its random draws."""

    ids_BT: Tensor
    """int64."""

    is_real_BT: Tensor
    """bool: False at padding."""

    patches_BPF: Tensor | None = None
    """Pictures that are read before the text; None where rows are text alone."""

    @property
    def num_patches(self) -> int:
        return 0 if self.patches_BPF is None else self.patches_BPF.shape[1]

    def to(self, device: torch.device) -> TokenRows:
        patches = None if self.patches_BPF is None else self.patches_BPF.to(device)
        ids, real = self.ids_BT.to(device), self.is_real_BT.to(device)
        return replace(self, ids_BT=ids, is_real_BT=real, patches_BPF=patches)


class Draw(Protocol):
    """What the positions of a micro-batch are asked: it is made on the CPU, from its rows alone."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of the positions that each term's loss runs over."""
        ...

    def to(self, device: torch.device) -> Draw: ...


class Objective(Protocol):
    """A frozen config; ``table.py`` lists them."""

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each term; a term's mean over the whole step is weighted, not its sum."""
        ...

    @property
    def is_causal(self) -> bool:
        """Whether the main model is a decoder, each position of which reads those before it."""
        ...

    @property
    def takes_pictures(self) -> bool:
        """Whether rows may have patches before their text."""
        ...

    @property
    def helper_divisor(self) -> int | None:
        """How many times narrower the helper is than the main model; None if there is none."""
        ...

    def draw(self, rows: TokenRows, inputs: Inputs, *, seed: int, step: int) -> Draw:
        """Choose what each position is asked. Each row has a generator of its own, so that neither
        ranks nor micro-batches change a draw."""
        ...

    def build(self, main: nn.Module, helper: nn.Module | None, inputs: Inputs) -> nn.Module:
        """Return the module that is trained; ``module(rows, draw)`` returns ``TermLosses``.

        main, helper: models as of Hugging Face, without a head; the module holds them as
        ``main.body`` and ``helper.body``. ValueError for sizes that do not fit.
        """
        ...


def weighted_loss(
    losses: TermLosses, counts: Mapping[str, int], weights: Mapping[str, float]
) -> Tensor:
    """Return the sum over terms of weight * sum / count.

    counts: over the whole step, so that neither ranks nor micro-batches are means of their own. A
    term without a position has no part.
    """
    terms = [weights[name] * loss / counts[name] for name, loss in losses.items() if counts[name]]
    return torch.stack(terms).sum()
