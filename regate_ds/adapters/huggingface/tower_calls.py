"""Agree over the data ranks on how often each micro-batch runs the vision tower.

Hosts run it once on the images of a micro-batch and once on its videos. Under ZeRO-3 the ranks
gather its weights together, so all of them must enter it equally often; and where images and videos
reach different weights, all ranks must reach the same ones under every stage. So each rank tells
the others what its micro-batches have, in the exchange of counts that planning makes anyway, and
makes up for the calls that it lacks with empty images (`empty_image.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regate_ds.families.table import find_family

IMAGE, VIDEO = "image", "video"

Calls = tuple[str, ...]
"""What the tower runs on in one micro-batch, call by call."""

PIXELS = {"pixel_values": IMAGE, "pixel_values_images": IMAGE, "pixel_values_videos": VIDEO}
"""Inputs of a multimodal model that make it run its vision tower, and what they hold."""

_NUM_TALLIES = 3


@dataclass(frozen=True, kw_only=True)
class TowerCalls:
    """How ranks agree on their calls; without fields, they do not."""

    several: bool = False
    """The tower may run on images and on videos, and the family's empty image is known."""

    by_kind: bool = False
    """Images and videos reach different weights."""

    @property
    def from_stage(self) -> int:
        """The first ZeRO stage under which ranks must agree."""
        return 1 if self.by_kind else 3

    def tally(self, micro: Sequence[Any]) -> list[int]:
        """Return what this rank's micro-batches add to the sums over the ranks."""
        if not self.several:
            return []
        found = [kinds_of(batch.inputs) for batch in micro]
        return [int(x) for has in found for x in (IMAGE in has, VIDEO in has, len(has) == 2)]

    def agreed(self, tallies: Sequence[int]) -> Iterator[Calls]:
        """Yield the calls of each micro-batch on every rank; nothing where ranks do not agree."""
        for start in range(0, len(tallies), _NUM_TALLIES):
            images, videos, both = map(bool, tallies[start : start + _NUM_TALLIES])
            if self.by_kind:
                yield (IMAGE,) * (images or not videos) + (VIDEO,) * videos
            else:
                yield (IMAGE,) * (2 if both else 1)


def tower_calls_of(model: Any) -> TowerCalls:
    """Return what ranks must agree on for a model, which may have adapters of PEFT."""
    host = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = find_family(host)
    if family is None or not hasattr(host.base_model, "get_video_features"):
        return TowerCalls()
    return TowerCalls(several=True, by_kind=family.empty_video is not None)


def kinds_of(inputs: Mapping[str, Any]) -> Calls:
    """Return on what the host itself runs its tower, in its order."""
    return tuple(sorted({kind for name, kind in PIXELS.items() if inputs.get(name) is not None}))


def calls_beside(own: Calls, agreed: Calls) -> Calls:
    """Return the agreed calls that are left when the host makes its own.

    ValueError if there are more of its own.
    """
    if len(own) > len(agreed):
        raise ValueError(
            f"a micro-batch has {' and '.join(own)} inputs, but when it was planned it had none of "
            "some: give the model the inputs that the collate function returned"
        )
    left = list(agreed)
    for kind in own:
        left.remove(kind if kind in left else left[-1])
    return tuple(left)
