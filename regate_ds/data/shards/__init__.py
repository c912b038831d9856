"""Raw records of shards: WebDataset's tar files, as Energon prepares them too, and MosaicML's MDS.

Start with ``records.py``: every sample has a place in the shards, and is read from there when it is
asked for. ``folder.py`` says which files the shards of a data path are, ``tar.py`` and ``mds.py``
what lies in one.
"""
