"""The formats that records are written in; each becomes the same list of turns.

Start at `table.py`, which picks the format of a turn by its fields. `fields.py` says which fields
of other tools are refused, and `sources.py` turns what stands for an image or a video into one.
"""
