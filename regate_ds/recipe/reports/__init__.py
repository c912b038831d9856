"""Reports on runs, stores and samples: tables, pictures, and the words a teacher finds hard.

It imports the library, the run folder, the configuration and the corpus; nothing here trains.
Start at `compare.py`, which is `regate compare`; `store.py` is `regate store`.
"""
