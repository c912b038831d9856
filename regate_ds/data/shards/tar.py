"""WebDataset's shards: consecutive members of a tar file with the same name are one sample.

What stands behind a name's first dot is the field; ``json`` is the record, the others its images.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from regate_ds.data.llava.records import Cause

_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")
_NUMBERED = re.compile(r"([^0-9]*)([0-9]+)\.[^.]+")
_META = re.compile(r"__[^/]*__($|/)")
_IMAGES = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm"})
_FIELDS = ("image", "images")
_CHUNK = 1 << 20


def samples_in_tar(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each sample of a shard, and where its members begin and end.

    ValueError if it is no tar file, a compressed or a damaged one, or several behind one another.
    """
    name, start, end = None, 0, 0
    try:
        with tarfile.open(path, "r:") as file:
            for member in file:
                # Else the file would keep all of them.
                file.members = []  # type: ignore[assignment]
                found = _parts(member)
                if found is None:
                    continue
                if found[0] != name:
                    if name is not None:
                        yield name, start, end
                    name, start = found[0], member.offset
                end = file.offset
            stop = file.offset
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} cannot be read as a tar file without compression ({error}); write it again"
        ) from error
    _require_end(path, stop)
    if name is not None:
        yield name, start, end


def _require_end(path: Path, stop: int) -> None:
    """Refuse, by ValueError, a tar file that has more than zeros behind its last member.

    ``tarfile`` takes a header that it cannot read for the end.
    """
    with path.open("rb") as file:
        file.seek(stop)
        while chunk := file.read(_CHUNK):
            if any(chunk):
                raise ValueError(
                    f"{path} has more behind byte {stop}, where its members end: it is damaged, or "
                    "several tar files behind one another; write it again"
                )


def read_tar_sample(content: bytes) -> Any:
    """Return the raw record of a sample's bytes, with its images in it; a Cause if it has none."""
    name, fields = "", dict[str, bytes]()
    with tarfile.open(fileobj=BytesIO(content), mode="r:") as file:
        for member in file:
            if (found := _parts(member)) is not None:
                name, field = found
                if field in fields:
                    return Cause(f"{name} has .{field} twice; give each member a name of its own")
                fields[field] = file.extractfile(member).read()  # type: ignore[union-attr]
    if "json" not in fields:
        return Cause(f"{name} has no .json, but {', '.join(fields)}; its record belongs there")
    try:
        record = json.loads(fields.pop("json"))
    except (ValueError, RecursionError) as error:
        return Cause(f"{name}.json is not JSON ({error})")
    # Megatron-LM's own converter writes the list alone.
    record = {"conversations": record} if isinstance(record, list) else record
    if not isinstance(record, dict):
        return record
    return _with_images({"id": name, **record}, name, fields)


def _with_images(record: dict[str, Any], name: str, fields: dict[str, bytes]) -> Any:
    others = [field for field in fields if field.rpartition(".")[2].lower() not in _IMAGES]
    if others:
        return Cause(f"{name} has .{others[0]}, which is not read; leave it out of the shards")
    given = [field for field in _FIELDS if record.get(field) not in (None, [], "")]
    if not given:
        return {**record, "images": _inline(_in_order(fields), name)} if fields else record
    # The record names its images; what is no member is a file beside the shards.
    members = {**fields, **{f"{name}.{field}": one for field, one in fields.items()}}
    members |= {each.rpartition("/")[2]: one for each, one in members.items()}
    used: set[int] = set()
    for field in given:
        entries = record[field] if isinstance(record[field], list) else [record[field]]
        record[field] = [_member(entry, members, used) for entry in entries]
    unused = [field for field, one in fields.items() if id(one) not in used]
    if unused:
        return Cause(f"{name} has .{unused[0]}, which its record does not name")
    return record


def _in_order(fields: dict[str, bytes]) -> dict[str, bytes]:
    """Return numbered images by their numbers: who sorts their names writes 10 before 2."""
    found = [_NUMBERED.fullmatch(field) for field in fields]
    prefixes = {one and one.group(1) for one in found}
    if None in prefixes or len(prefixes) > 1:
        return fields
    return dict(sorted(fields.items(), key=lambda one: int(_NUMBERED.sub(r"\2", one[0]))))


def _inline(fields: dict[str, bytes], name: str) -> list[dict[str, Any]]:
    return [{"bytes": one, "path": f"{name}.{field}"} for field, one in fields.items()]


def _member(entry: Any, members: dict[str, bytes], used: set[int]) -> Any:
    if not isinstance(entry, str) or entry not in members:
        return entry
    used.add(id(members[entry]))
    return {"bytes": members[entry], "path": entry}


def _parts(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Return the sample's name and the field of a member; None if it belongs to no sample."""
    found = _NAME.fullmatch(member.name)
    if not member.isfile() or found is None or _META.match(member.name):
        return None
    return found.group(1), found.group(2)
