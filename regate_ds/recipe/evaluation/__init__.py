"""Measure a model on held-out questions: teacher-forced words, and words of generated answers.

The two measures import the library alone; `finished_run.py`, which is `regate eval`, also imports
the configuration and the corpus. Start at `words.py`, which the training loop calls.
"""
