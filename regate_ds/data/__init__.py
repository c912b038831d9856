"""Samples on their way to the model: read, encoded, and joined into micro-batches with keys.

Files here may import the rooms below (`algorithm/` and others), torch and Pillow; no framework.
Start at `keyed.py` for a data set of your own, at `collate.py` for LLaVA-format data.
"""
