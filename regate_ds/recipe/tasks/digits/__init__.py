"""Questions on scenes of real handwritten digits, answered by a small LLaVA made on the spot.

`scenes.py` draws, `questions.py` asks, `student.py` makes the student in four phases. The folder
may import all of the recipe. Start at `task.py`, the record that `tasks/table.py` lists.
"""
