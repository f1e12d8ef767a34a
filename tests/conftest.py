"""How property tests choose their examples: the same ones in every run, so that no verdict depends on luck or speed.

To look further than a test run does, with other examples each time: `pytest --hypothesis-profile=search`.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,  # a slow machine is no failure
    database=None,  # nothing is carried from one run to the next
    suppress_health_check=[HealthCheck.too_slow],  # likewise
)
settings.register_profile("search", settings.get_profile("repeatable"), derandomize=False, max_examples=5_000)
settings.load_profile("repeatable")
