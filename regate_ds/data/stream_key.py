"""The key of an item that comes from a stream, where no number says which item it is."""

from __future__ import annotations

import hashlib

from regate_ds.algorithm.batch import SampleKey


def stream_key(name: str, *parts: str | int) -> SampleKey:
    """Return the key of the item that these texts or numbers name within the data set ``name``.

    parts: what stays the same whenever the item comes again, on any rank and in any epoch, and is
    no other item's, such as a shard's file name and the item's name in it. The key's number is a
    hash of 63 bits over them: of a hundred million items two share one with a probability of
    5e-4. ``score_dataset`` and every step name two items of one key, if they differ.

    ValueError for a part that is neither text nor whole number, or if there is none.
    """
    if not parts or not all(type(part) in (str, int) for part in parts):
        raise ValueError(
            f"stream_key({name!r}) got {parts!r}; give texts or whole numbers that name the item, "
            "such as its '__url__' and its '__key__'"
        )
    # The lengths keep ("ab", "c") and ("a", "bc") apart, the types "1" and 1.
    told = "".join(f"{type(part).__name__}{len(str(part))}:{part}" for part in parts)
    digest = hashlib.blake2b(told.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return name, int.from_bytes(digest, "little") >> 1
