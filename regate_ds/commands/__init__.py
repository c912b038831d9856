"""The sub-commands of `regate`, one file each: its arguments, and what it prints.

The work of a command is in `recipe/`, which is imported when the command runs, so that --help is
quick. Commands may import the recipe and the library; only `cli.py` imports them. Start at
`cli.py`, which lists them.
"""
