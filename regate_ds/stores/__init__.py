"""One value for each label position: the teacher's losses, and the student's difficulty.

Files here may import `algorithm/`, `parallel/` and numpy, and no framework.
Start at `answer_index.py`, which says where a sample's values lie; then open a folder below.
"""
