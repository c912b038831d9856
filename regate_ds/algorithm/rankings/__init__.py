"""Rankings: in which order an image's tokens are kept. A ranking is a file and a line in
`table.py`; `ranking.py` is the contract.

`random` and `stride` need nothing; the others read orders that `regate rank` computes once.
"""
