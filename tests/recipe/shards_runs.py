"""`regate train` on shards is the run on a JSON file with the same records, bit for bit.

Run by ``make test-streams``: with stored losses, with the teacher inside, and resumed after a kill;
the shards are WebDataset's, and MosaicML's and Energon's as their own packages write them.
"""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.teacher_job import run_teacher
from tests.data.shards.real_packages import MDSWriter
from tests.recipe.recipe_helper import Killed, KilledTrainer, assert_same_run, run
from tests.support.ranks import run_ranks
from tests.support.small_corpus import make_corpus

COLUMNS = {"conversations": "json", "id": "str", "images": "list[png]"}


def records(folder: Path) -> list[dict[str, Any]]:
    """Each record of the training set, with its image's bytes in place of its name."""
    found = []
    for number, raw in enumerate(json.loads((folder / "data" / "train.json").read_text())):
        content = (folder / "data" / raw["image"]).read_bytes()
        found.append({**raw, "image": content, "id": str(raw.get("id", number))})
    return found


def write_tars(folder: Path, found: list[dict[str, Any]]) -> None:
    folder.mkdir()
    for start in range(0, len(found), 16):
        with tarfile.open(folder / f"shard-{start // 16:02d}.tar", "w") as file:
            for number, raw in enumerate(found[start : start + 16], start):
                record = {name: value for name, value in raw.items() if name != "image"}
                for field, content in (
                    ("png", raw["image"]),
                    ("json", json.dumps(record).encode()),
                ):
                    about = tarfile.TarInfo(f"{number:06d}.{field}")
                    about.size = len(content)
                    file.addfile(about, BytesIO(content))


def write_mds(folder: Path, found: list[dict[str, Any]]) -> None:
    with MDSWriter(out=str(folder), columns=COLUMNS, size_limit=1 << 14) as writer:
        for raw in found:
            writer.write(
                {name: raw[name] for name in ("conversations", "id")}
                | {"images": [picture_of(raw["image"])]}
            )


def picture_of(content: bytes) -> Any:
    from PIL import Image

    return Image.open(BytesIO(content))


def check_runs(rank: int, folder: str) -> None:
    root = Path(folder)
    run_teacher(load_config(root / "run.yaml"))
    found = records(root)
    write_tars(root / "tars", found)
    write_mds(root / "mds", found)
    write_tars(root / "energon", found)
    parts = [("train", "shard-.*")]
    names = [path.name for path in sorted((root / "energon").glob("*.tar"))]
    BaseWebdatasetFactory.prepare_dataset(
        root / "energon", names, split_parts_patterns=parts, workers=1
    )
    run(root, "whole")
    for name in ("tars", "mds", "energon/train"):
        out = name.partition("/")[0]
        data = f"data.train={root / name}"
        run(root, f"of-{out}", data)
        assert_same_run(root, "whole", f"of-{out}")
        with pytest.raises(Killed):
            run(root, f"killed-{out}", data, trainer=KilledTrainer)
        run(root, f"killed-{out}", data, "run.resume=true")
        assert_same_run(root, "whole", f"killed-{out}")
    run(root, "online", f"data.train={root / 'tars'}", "teacher.mode=online")
    run(root, "online-of-json", "teacher.mode=online")
    assert_same_run(root, "online-of-json", "online")


def test_runs_on_shards_are_the_run_on_a_file(tmp_path: Path):
    make_corpus(tmp_path)
    run_ranks(check_runs, 1, str(tmp_path), timeout=900)
