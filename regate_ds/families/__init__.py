"""Model families: one frozen record for each, in a file for each vendor's line of models.

Files here may import `data/` and torch; a record names its transformers class, and loads it only
when asked to. Start at `family.py`, which says what a record holds; to add a family, write a file
here and a line in `table.py`, which adapters, teacher and recipe read.
"""
