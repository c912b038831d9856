"""Conversations with images: from a data file to the token ids of a sample.

Files here may import `algorithm/` and Pillow, and PyAV or `datasets` where a file needs them; the
tokenizer is an argument. Start at `records.py` for what a record is, then `read.py` (the file),
`formats/` (its ways to say it) and `encode.py` (the tokens).
"""
