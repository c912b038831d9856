"""Complete training runs on top of the library: configuration, student, engine, loop and reports.

It may import every room of the library; only `commands` and `cli` import it, and no user of the
plugin needs it. Start at `trainer.py`, which builds a run in order and trains it;
`config/sections.py` says what can be set.
"""
