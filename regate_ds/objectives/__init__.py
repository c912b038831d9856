"""Pre-training objectives, some with a helper model: what a row is asked, and what that costs.

A frozen config draws what a row's positions are asked before any forward pass; its module holds the
main model, the helper and the small heads, and returns a sum of losses for each of its terms. Start
at `contract.py`; a file is an objective, `table.py` names them all. Imports torch alone.
"""
