"""`regate bench learning`: does a method learn as well as the dense run, and at which cost?

Arms, tasks and rounds are files in configs/learning/, a result is a JSON file under version
control, and what is missing is run. Start at `run_round.py`; `files.py` has what the files may say.
"""
