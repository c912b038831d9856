"""`regate doctor`: checks of versions, devices, kernels, memory, disk and the ranks of a job.

It imports the library, the configuration and the estimate of a run's needs. Start at `examine.py`,
which makes the checks of one rank; `ranks.py` has those that ranks make together.
"""
