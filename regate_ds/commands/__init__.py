"""The sub-commands of `regate`, a file each: its arguments, and what it prints.

What a command does stands in `recipe/`; it is imported when the command runs, so that --help is
quick. `cli.py` lists them.
"""
