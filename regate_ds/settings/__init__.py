"""Read frozen dataclasses of settings from YAML; the settings themselves lie beside their users.

`yaml.py` reads the plain values, `section.py` builds the dataclasses, `refuse.py` words a refusal.
Files here import PyYAML and each other, nothing else. Start at `section.py`.
"""
