"""The shapes task: drawn pictures, questions on relations and numbers, and a student for them.

`scenes.py` draws, `questions.py` asks, and `lessons.py` says what the phases of the student learn
from. Start at `task.py`, the record that `tasks/table.py` lists.
"""
