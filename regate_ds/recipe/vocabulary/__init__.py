"""A tokenizer trained on one's own data, and the student that reads by it."""
