"""What is known of model families: one frozen record each, a file for each vendor's line.

Adapters, the teacher and the recipe read the same record. A family that is new to the project is a
file here and a line in `table.py`; start at `family.py`, which says what a record holds.
"""
