"""How a task's student is made from nothing: four phases over pictures whose content is known.

A task says in a `Lessons` what its pictures are; all else is the same for each task. Start at
`student.py`, which runs the phases in order, then read `lessons.py`.
"""
