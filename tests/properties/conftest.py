"""Examples are the same in every run; EXAMPLES=... tries so many of each, and draws them anew."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_asked = os.environ.get("EXAMPLES")
settings.register_profile(
    "properties",
    max_examples=int(_asked or 25),
    derandomize=_asked is None,
    deadline=None,
    report_multiple_bugs=False,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("properties")
