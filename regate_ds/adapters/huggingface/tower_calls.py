"""Agree over the data ranks on how often each micro-batch runs the vision tower.

Hosts run it once on the images of a micro-batch and once on its videos. Under ZeRO-3 and FSDP2 the
ranks gather its weights together, so all of them must enter it equally often; and where images and
videos reach different weights, all ranks must reach the same ones under every stage. So each rank
tells the others what its micro-batches have, in the exchange of counts that planning makes anyway,
and makes up for the calls that it lacks with empty images (`empty_image.py`).

Audio has no such filling: where some ranks hear it and others do not, all of them refuse the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from regate_ds.families.table import find_family

IMAGE, VIDEO = "image", "video"

Calls = tuple[str, ...]
"""What the tower runs on in one micro-batch, call by call."""

PIXELS = {
    **dict.fromkeys(("pixel_values", "pixel_values_images", "image_pixel_values"), IMAGE),
    "pixel_values_videos": VIDEO,
}
"""Inputs of a multimodal model that make it run its vision tower, and what they hold."""

AUDIO = ("input_features", "audio_input_features")
"""Inputs that make it run its audio tower."""

_NUM_TALLIES = 5


@dataclass(frozen=True, kw_only=True)
class TowerCalls:
    """How ranks agree on their calls; without fields, they do not."""

    several: bool = False
    """The tower may run on images and on videos, and the family's empty image is known."""

    by_kind: bool = False
    """Images and videos reach different weights."""

    hears: bool = False
    """The model has an audio tower."""

    hears_by_image: bool = False
    """Audio reaches different weights where images are beside it."""

    def under(self, stage: int, num_ranks: int) -> TowerCalls:
        """Return what so many data ranks must agree on under a ZeRO stage, or what is like it."""
        if num_ranks == 1 or stage == 0:
            return TowerCalls()
        return replace(self, several=self.several and (stage == 3 or self.by_kind))

    def tally(self, micro: Sequence[Any]) -> list[int]:
        """Return what this rank's micro-batches add to the sums over the ranks."""
        if not (self.several or self.hears):
            return []
        return [int(each) for batch in micro for each in _found(batch.inputs)]

    def agreed(self, tallies: Sequence[int], num_ranks: int) -> tuple[Calls, ...]:
        """Return the calls of each micro-batch on every rank; nothing where ranks do not agree.

        ValueError, on all ranks, if only some hear audio in a micro-batch.
        """
        found = [tallies[i : i + _NUM_TALLIES] for i in range(0, len(tallies), _NUM_TALLIES)]
        for number, (*_, audio, audio_and_image) in enumerate(found):
            if audio not in (0, num_ranks):
                raise ValueError(_unequal("audio", audio, number, num_ranks))
            if self.hears_by_image and audio_and_image not in (0, num_ranks):
                what = "images beside their audio"
                raise ValueError(_unequal(what, audio_and_image, number, num_ranks))
        return tuple(self._calls(*map(bool, one[:3])) for one in found if self.several)

    def _calls(self, images: bool, videos: bool, both: bool) -> Calls:
        if self.by_kind:
            return (IMAGE,) * (images or not videos) + (VIDEO,) * videos
        return (IMAGE,) * (2 if both else 1)


def _found(inputs: Mapping[str, Any]) -> tuple[bool, ...]:
    kinds, hears = kinds_of(inputs), any(inputs.get(name) is not None for name in AUDIO)
    return (IMAGE in kinds, VIDEO in kinds, len(kinds) == 2, hears, hears and IMAGE in kinds)


def _unequal(what: str, num_with: int, number: int, num_ranks: int) -> str:
    return (
        f"in micro-batch {number} of the step {num_with} of {num_ranks} data ranks have {what}: "
        "they would wait for the others; put a sample with audio into every micro-batch or into "
        "none, or use ZeRO stage 0"
    )


def tower_calls_of(model: Any) -> TowerCalls:
    """Return what ranks must agree on for a model, which may have adapters of PEFT."""
    host = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = find_family(host)
    several = family is not None and hasattr(host.base_model, "get_video_features")
    return TowerCalls(
        several=several,
        by_kind=several and family.empty_video is not None,
        hears=getattr(getattr(host, "config", None), "audio_config", None) is not None,
        # Phi-4 multimodal, alone here in having an embedder, has a projector for each.
        hears_by_image=family is not None and family.embedder is not None,
    )


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
