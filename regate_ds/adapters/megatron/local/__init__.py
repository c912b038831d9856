"""One rank's share of a plan: where the rank stands, which rows it holds, and at which angles.

Start at `plan.py`.
"""
