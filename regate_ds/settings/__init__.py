"""Settings: frozen dataclasses, read from YAML and judged at birth.

`section.py` builds them from plain values, `yaml.py` reads the values, `refuse.py` says no. The
settings themselves stand beside what they set.
"""
