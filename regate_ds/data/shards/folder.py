"""Which shards a data path names, in order."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

from regate_ds.settings.yaml import read_yaml

TAR = ".tar"

ENERGON = ".nv-meta"
"""Folder in which Megatron-Energon keeps what it knows of a folder of shards."""

SHARD_COLUMNS = ("column_names", "column_encodings", "column_sizes")
"""What MosaicML's index says of a shard's columns: three lists of one length."""

_SPLITS = "split.yaml"
_INDEX = "index.json"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_shards(path: Path) -> bool:
    """Return whether a data path is a tar file, tar files in braces, a folder of shards, or the
    split of one."""
    if path.suffix == TAR:
        return True
    if path.is_dir():
        return _is_mds(path) or any(path.glob(f"*{TAR}")) or (path / ENERGON / _SPLITS).is_file()
    return not path.exists() and (path.parent / ENERGON / _SPLITS).is_file()


def folder_of_shards(path: Path) -> Path:
    """Return the folder that a path's shards lie in."""
    return path if path.is_dir() else path.parent


def data_shards(path: Path) -> list[Path]:
    """Return the path's shards in order.

    ValueError if there are none, if one is missing, or if a folder has several splits.
    """
    if path.suffix == TAR and not path.is_dir():
        return _existing(_expanded(path.name), path.parent, path)
    folder = folder_of_shards(path)
    if (folder / ENERGON / _SPLITS).is_file():
        return _existing(_of_split(path, folder), folder, folder / ENERGON / _SPLITS)
    if _is_mds(path):
        return _existing([*read_index(path)], path, path / _INDEX)
    return sorted(each for each in path.glob(f"*{TAR}") if not each.name.startswith("."))


def described_by(path: Path) -> list[Path]:
    """Return the files beside the shards that say which samples they are."""
    folder = folder_of_shards(path)
    known = (folder / ENERGON / _SPLITS, folder / _INDEX)
    return [each for each in known if each.is_file() and path.suffix != TAR]


def left_out(path: Path) -> frozenset[str]:
    """Return the samples that Energon excludes, as "folder/shard/key"."""
    splits = folder_of_shards(path) / ENERGON / _SPLITS
    if path.suffix == TAR or not splits.is_file():
        return frozenset()
    named = _read_splits(splits).get("exclude") or []
    return frozenset(one for name in named for one in _expanded(name))


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what MosaicML's index says of each shard, by its file's name, in order.

    ValueError if it is no such index, or one of shards that are not read here.
    """
    path, found = folder / _INDEX, dict[str, dict[str, Any]]()
    try:
        for shard in json.loads(path.read_text("utf-8"))["shards"]:
            if shard["format"] != "mds" or shard["compression"] is not None:
                kind = f"format={shard['format']!r}, compression={shard['compression']!r}"
                raise ValueError(
                    f"{path} has shards of {kind}, which are not read; write them by MDSWriter "
                    "without compression"
                )
            found[shard["raw_data"]["basename"]] = {key: shard[key] for key in SHARD_COLUMNS}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no index of MDSWriter ({type(error).__name__}: {error}); write it again"
        ) from error
    return found


def _is_mds(path: Path) -> bool:
    return (path / _INDEX).is_file() and '"shards"' in (path / _INDEX).read_text("utf-8")


def _of_split(path: Path, folder: Path) -> list[str]:
    about = _read_splits(folder / ENERGON / _SPLITS)
    splits: dict[str, list[str]] = about["split_parts"]
    asked = None if path == folder else path.name
    used = [name for name, shards in splits.items() if shards]
    if asked is None and len(used) == 1:
        (asked,) = used
    if asked not in used:
        known = ", ".join(str(folder / name) for name in used)
        raise ValueError(f"{folder} has the splits {', '.join(used)}; name one of {known}")
    gone = left_out(folder)
    return [one for name in splits[asked] for one in _expanded(name) if one not in gone]


def _read_splits(path: Path) -> dict[str, Any]:
    about = read_yaml(path.read_text("utf-8"))
    if not isinstance(about, dict) or not isinstance(about.get("split_parts"), dict):
        raise ValueError(f"{path} has no split_parts; make it by `energon prepare`")
    return about


def _expanded(name: str) -> list[str]:
    """Return the names that ranges and lists in braces stand for: shard-{000..011}.tar."""
    parts = _BRACES.split(name)
    choices = [[part] for part in parts]
    for place in range(1, len(parts), 2):
        found = _RANGE.fullmatch(parts[place])
        choices[place] = parts[place].split(",")
        if found is not None:
            first, last = found.groups()
            numbers = range(int(first), int(last) + 1)
            choices[place] = [str(number).zfill(len(first)) for number in numbers]
    return ["".join(chosen) for chosen in product(*choices)]


def _existing(names: list[str], folder: Path, said_by: Path) -> list[Path]:
    found = [folder / name for name in names]
    missing = [path for path in found if not path.is_file()]
    if missing or not found:
        what = f"the shard {missing[0]}" if missing else "no shard"
        there = "which is not there" if missing else "where some are needed"
        raise ValueError(f"{said_by} names {what}, {there}; correct it, or fetch the files")
    return found
