"""The cache of a data set: where its records lie, their answer index, and which of them are bad.

It is built once, in parallel workers, and mapped at every start on all ranks. Start at `entry.py`,
which opens a data set or has it built; `build.py` writes the files, `source.py` says of what.
"""
