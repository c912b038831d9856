"""Merged steps under each host: its decoder reads patches of tokens in place of tokens.

A file a host, which is loaded where a run has such steps, and by no other run. Start at
`huggingface.py`; the plans are made in `algorithm/executions/merge.py`.
"""
