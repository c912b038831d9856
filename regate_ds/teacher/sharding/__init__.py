"""A teacher that is too large for one rank: cut over tensor ranks, or in ZeRO-3's pieces.

Files here may import transformers, deepspeed and the teacher's modules above. Start at
`placement.py`, which follows `teacher.sharding`; `weights.py` reads one tensor at a time.
"""
