"""Checkpoints of a run, and the finished model.

Start with ``checkpoint.py``, which saves and loads; ``contents.py`` says what a complete checkpoint
holds, and ``model.py`` writes the student as a Hugging Face folder.
"""
