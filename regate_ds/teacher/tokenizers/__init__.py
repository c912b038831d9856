"""Teachers by their tokenizer: `same.py` if it is the student's, `other.py` if it is another one.

Files here may import `data/` and the teacher's `scoring.py`; tokenizers are arguments. Start at
`same.py`; `other.py` shares losses out by characters, as `alignment.py` says.
"""
