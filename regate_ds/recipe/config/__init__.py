"""The configuration of a run: a frozen tree, read from YAML, whose wrong values are refused early.

It imports the library and the two sections that stand elsewhere in the recipe, `optimizer.py` and
`students/config.py`. Start at `tree.py`; `sections.py` has most of the keys, and the other files
judge them against a DeepSpeed JSON file and against what Megatron-core can do.
"""
