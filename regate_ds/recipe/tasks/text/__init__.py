"""Real text for small experiments: plain files of the user become blocks of tokens.

`documents.py` reads and divides them, `blocks.py` trains a tokenizer on the training part and lays
its tokens in rows of one length. Start at `open_text`.
"""
