"""LLaVA-format data: from a JSON file to the token ids of a sample.

Files here may import `algorithm/` and Pillow; the tokenizer is an argument. Start at `records.py`
for what a record is, then `read.py` (the file) and `encode.py` (the tokens).
"""
