"""A decoder's experts one by one, where Hugging Face's model has those of a layer in one tensor.

Shapes: E experts, I inner width, H hidden. `gate_up_proj` is [E, 2 I, H], `down_proj` [E, H, I].
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from regate_ds.teacher.sharding.weights import WeightCut, WeightSource

_ONE = re.compile(r"(.*\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class SplitExperts:
    """Weights by the names of a causal LM; an expert's as `...experts.3.up_proj.weight` too.

    It is cut out of the tensor of all, unless the decoder has it by this name.
    """

    decoder: WeightSource

    def __contains__(self, name: object) -> bool:
        return self._place(str(name))[0] in self.decoder

    def shape(self, name: str) -> tuple[int, ...]:
        stored, expert, half = self._place(name)
        whole = self.decoder.shape(stored)
        if expert is None:
            return whole
        return (whole[1] if half is None else whole[1] // 2, whole[2])

    def read(self, name: str, cut: WeightCut | None = None) -> Tensor:
        stored, expert, half = self._place(name)
        if expert is None:
            return self.decoder.read(name, cut)
        one = self.decoder.read(stored, WeightCut(0, expert, expert + 1))[0]
        if half is not None:
            one = one.chunk(2)[half]
        return one if cut is None else one.narrow(cut.dim, cut.start, cut.stop - cut.start)

    def _place(self, name: str) -> tuple[str, int | None, int | None]:
        """Return the stored tensor, the expert in it, and which half of its rows."""
        found = _ONE.fullmatch(name)
        if found is None or name in self.decoder:
            return name, None, None
        stem, expert, kind = found[1], int(found[2]), found[3]
        if kind == "down":
            return f"{stem}down_proj", expert, None
        return f"{stem}gate_up_proj", expert, int(kind == "up")


def join_experts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the experts of each layer into one tensor, as Hugging Face's model has them."""
    joined = {name: weight for name, weight in weights.items() if not _ONE.fullmatch(name)}
    matches = [found for name in weights if (found := _ONE.fullmatch(name))]
    for stem in dict.fromkeys(found[1] for found in matches):
        count = 1 + max(int(found[2]) for found in matches if found[1] == stem)
        gate, up, down = (
            torch.stack([weights[f"{stem}{e}.{kind}_proj.weight"] for e in range(count)])
            for kind in ("gate", "up", "down")
        )
        joined |= {f"{stem}gate_up_proj": torch.cat([gate, up], dim=1), f"{stem}down_proj": down}
    return joined
