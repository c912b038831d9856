"""Look at what is unpickled of a distributed checkpoint, before torch and Megatron-core do it.

The format keeps its table of tensors in `.metadata`, and plain values in `common.pt` (megatron-core
0.16.1) or among the tensors (0.19.2). Its readers unpickle the first and, in 0.19.2, the last.
"""

from __future__ import annotations

import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

_METADATA = {
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
}

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": _METADATA,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}
"""Names in a table of tensors, by module; torch's dtypes come with them."""


class _TableReader(pickle.Unpickler):
    """Unpickles a table of tensors; ValueError names anything else before it is called."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        is_dtype = module_name == "torch" and isinstance(
            getattr(torch, global_name, None), torch.dtype
        )
        if not is_dtype and global_name not in _ALLOWED.get(module_name, ()):
            raise ValueError(f"names {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def require_harmless(folder: Path) -> None:
    """Refuse a distributed checkpoint that would run code when it is read.

    ValueError says what of `.metadata` would; pickle.UnpicklingError, of other plain values.
    """
    path = folder / ".metadata"
    if not path.is_file():
        raise ValueError(
            f"{folder.parent} is of a version before Megatron-core's distributed checkpoints; go "
            "on with that version, or start a run from its model"
        )
    with path.open("rb") as file:
        try:
            table = _TableReader(file).load()
            if not isinstance(table, Metadata):
                raise ValueError(f"holds a {type(table).__name__}")
        except ValueError as error:
            raise ValueError(
                f"{path} {error}, which is no part of a table of tensors, and might run code; ask "
                f"who wrote it, or name another checkpoint in {folder.parent.parent / 'latest'}"
            ) from None
    for name, kind in table.state_dict_metadata.items():
        if isinstance(kind, BytesStorageMetadata):
            place = table.storage_data[MetadataIndex(name)]
            with (folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                torch.load(BytesIO(file.read(place.length)), weights_only=True)
    common = folder / "common.pt"
    if common.is_file():
        torch.load(common, weights_only=True)
