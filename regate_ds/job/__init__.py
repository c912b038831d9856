"""The processes of a job: they find their ranks, join, end on request, and fail together.

Files here may import `parallel/`, torch and deepspeed; `ranks.py` and `errors.py` import neither.
Start at `ranks.py` (which rank is this?), then `process.py` (join), `supervise.py` (end together).
"""
