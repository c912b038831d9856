"""Executions: what unchosen positions do in the layers. An execution is a file and a line in
`table.py`, which also says which host supports which; `execution.py` is the contract.

An execution owns *what* happens, by layer; an adapter owns *where*: arguments, hooks, stages.
"""
