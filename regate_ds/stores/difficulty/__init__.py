"""The difficulty store: what the student still finds hard, spread over the data ranks.

Files here may import `parallel/` and the modules of `stores/` itself. Start at `indexed.py`, for
data that an answer index lists beforehand; `stream.py` serves streams and augmented data.
"""
