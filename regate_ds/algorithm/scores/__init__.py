"""Scores: what ranks the label positions of a step. A score is a file and a line in `table.py`.

`score.py` is the contract. A score sees reference losses and statistics of the student, never a
model; the highest values are kept.
"""
