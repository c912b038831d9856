"""Model families: what is known of each class of transformers, as frozen records.

`hosts.py` and `text_decoders.py` say which class over which decoder can be elided, and what its
layers are given. `family.py` says what is known of images: where the tower lies, the smallest
image, how images are told apart; `table.py` lists these records. docs/add_a_model.md adds a model.

Files here may import `data/` and torch; a record names its transformers class, and loads it only
when asked to.
"""
