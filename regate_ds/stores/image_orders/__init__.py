"""The store of image orders: in which order each image's tokens are kept, computed once.

Files here may import the modules of `stores/` itself, and no framework. Start at `manifest.py` for
the files of a store, then read `reader.py`; `writer.py` serves the job of `regate rank`.
"""
