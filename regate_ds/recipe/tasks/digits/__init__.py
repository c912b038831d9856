"""Questions on scenes of real handwritten digits, answered by a small LLaVA made on the spot.

`scenes.py` draws, `questions.py` asks, and `lessons.py` says what the phases of the student learn
from. Start at `task.py`, the record that `tasks/table.py` lists.
"""
