"""What MosaicML streaming and Megatron-Energon write is read as they read it themselves.

Run by ``make test-streams``, in an environment of its own. Both packages come with much that is not
used here. torchvision, which streaming imports for its own data sets of pictures, is left out.
"""

from __future__ import annotations

import io
import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from regate_ds.data.shards.records import ShardRecords, find_samples
from tests.data.shards.shards_helper import picture, records_of, samples, talk, told, write_tars


def _without_torchvision() -> None:
    """Let streaming be imported; it uses of torchvision what no test here uses."""
    for name in ("", ".datasets", ".transforms", ".transforms.functional"):
        module = ModuleType(f"torchvision{name}")
        module.__spec__ = ModuleSpec(module.__name__, None)
        module.VisionDataset = type("VisionDataset", (), {})  # type: ignore[attr-defined]
        module.to_tensor = None  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module


if find_spec("torchvision") is None:
    _without_torchvision()

from megatron import energon  # noqa: E402
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory  # noqa: E402
from streaming import LocalDataset, MDSWriter  # noqa: E402


@energon.stateless
def as_it_is(sample: dict[str, Any]) -> dict[str, Any]:
    return {**energon.basic_sample_keys(sample), **sample}


class Cooking(energon.DefaultTaskEncoder):
    cookers = (energon.Cooker(as_it_is),)


COLUMNS = {
    "conversations": "json",
    "id": "str",
    "number": "int",
    "text_number": "str_int",
    "one": "jpeg",
    "other": "png",
    "raw": "bytes",
    "pillow": "pil",
    "images": "list[png]",
    "pillows": "list[pil]",
}


def opened(width: int, form: str = "PNG") -> Image.Image:
    return Image.open(io.BytesIO(picture(width, form=form)))


def mosaic_rows() -> list[dict[str, Any]]:
    return [
        {
            "conversations": talk(n, n % 3),
            "id": f"é{n}",
            "number": -n,
            "text_number": 10**20 + n,
            "one": opened(5 + n, "JPEG"),
            "other": opened(6 + n),
            "raw": b"\x00" * n,
            "pillow": opened(7 + n).convert("L"),
            "images": [opened(8 + n + i) for i in range(n % 3)],
            "pillows": [opened(9 + n)],
        }
        for n in range(7)
    ]


def plain(value: Any) -> Any:
    """A value as one can compare it: pictures as their pixels."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, bytes) and value[:3] in (b"\xff\xd8\xff", b"\x89PN"):
        value = Image.open(io.BytesIO(value))
    if isinstance(value, Image.Image):
        return value.mode, value.size, value.tobytes()
    return value


@pytest.mark.parametrize("size_limit", [1 << 12, 1 << 26])
def test_mosaicmls_shards_are_read_as_by_itself(tmp_path: Path, size_limit: int):
    with MDSWriter(out=str(tmp_path), columns=COLUMNS, size_limit=size_limit) as writer:
        for row in mosaic_rows():
            writer.write(row)
    assert (len(list(tmp_path.glob("*.mds"))) > 1) == (size_limit == 1 << 12)
    theirs = LocalDataset(str(tmp_path))
    ours = ShardRecords(tmp_path, find_samples(tmp_path))
    assert len(ours) == len(theirs) == 7
    for number in range(7):
        found, wanted = ours[number], theirs[number]
        assert found.keys() == wanted.keys() == COLUMNS.keys()
        for name in COLUMNS:
            assert plain(found[name]) == plain(wanted[name]), name


def test_energons_splits_are_read_as_by_itself(tmp_path: Path):
    made = samples(11)
    paths = write_tars(tmp_path, made, 2)
    parts = [("train", "shard-00[0-3].tar"), ("val", "shard-00[45].tar")]
    BaseWebdatasetFactory.prepare_dataset(
        tmp_path, [path.name for path in paths], split_parts_patterns=parts, workers=1
    )
    about = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (tmp_path / ".nv-meta" / "dataset.yaml").write_text(json.dumps(about))
    for split, num in (("train", 8), ("val", 3)):
        data = energon.get_val_dataset(
            tmp_path,
            split_part=split,
            worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=None,  # type: ignore[arg-type]
            task_encoder=Cooking(),
        )
        wanted = {sample["__key__"]: sample for sample in energon.get_loader(data)}
        raw = ShardRecords(tmp_path / split, find_samples(tmp_path / split))
        assert len(raw) == len(wanted) == num
        assert len(told(records_of(tmp_path / split))) == num
        for number, (key, sample) in enumerate(sorted(wanted.items())):
            assert key.rpartition("/")[2] == key_of(made, split, number)
            content = json.loads(made[int(key.rpartition("/")[2])]["json"])
            assert sample["json"] == content
            turns = content if isinstance(content, list) else content["conversations"]
            assert raw[number]["conversations"] == turns


def key_of(made: list[dict[str, bytes]], split: str, number: int) -> str:
    return made[number + (8 if split == "val" else 0)]["__key__"].decode()
