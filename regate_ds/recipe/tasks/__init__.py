"""Tasks that the project brings along: their data, a student made on the spot, and what is judged.

A task is a folder with one record (`task.py` says what it holds) and a line in `table.py`;
`regate data NAME` builds its data, `make quickstart` runs it from nothing to the comparison.
"""
