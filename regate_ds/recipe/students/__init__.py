"""The student of a run: a multimodal model with its tokenizer and image processor.

This folder imports the library and no other part of the recipe. Start at `student.py`; `load.py`
loads or makes a student, `trainable.py` prepares it for training, `config.py` has its settings.
"""
