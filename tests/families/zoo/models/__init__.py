"""The zoo's models: which families there are, and how each is made tiny.

`table.py` joins the lists of `squares.py`, `grids.py`, `others.py` and `texts.py`; `sizes.py`
shrinks a config by the names of its fields, and `family.py` builds the model.
"""
