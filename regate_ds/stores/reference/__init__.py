"""The reference store: the teacher's losses on disk, written once and then only read.

Files here may import the modules of `stores/` itself, and no framework. Start at `manifest.py` for
the files of a store, then read `reader.py`; `lifecycle.py` and `writer.py` serve the teacher's job.
"""
