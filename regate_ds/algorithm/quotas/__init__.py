"""Quotas: how many label positions of each sample are kept. A quota is a file and a line in
`table.py`; `quota.py` is the contract.

A quota sees values and samples of the step's window on all data ranks, and returns counts: what is
kept depends on the global batch only, not on how it is spread over ranks.
"""
