"""Patches by the variance of their pixels: flat patches are elided first."""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regate_ds.algorithm.rankings.ranking import ByStoredOrder, Picture, Reads, by_value


@dataclass(frozen=True, kw_only=True)
class PixelOrder(ByStoredOrder):
    """A cheap measure that needs no model: the patch's variance over all its values."""

    @property
    def stored(self) -> str:
        return "pixels"

    @property
    def reads(self) -> Reads:
        return "pixels"

    def order(self, picture: Picture, num_first: int) -> Tensor:
        assert picture.pixels_nP is not None
        return by_value(picture.pixels_nP.float().var(dim=1, correction=0))[:num_first]
