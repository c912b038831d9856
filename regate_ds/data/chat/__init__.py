"""Records become tokens as the model's own processor and chat template write them.

`render.py` writes a record's text and finds its answers in it, `image_text.py` says what the
processor puts in the place of an image of some size, and `encode.py`, where to start, makes tokens
and labels of both. `vision.py` makes the model's other inputs by the processor's own call.
"""
