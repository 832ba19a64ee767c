"""Property tests have no deadline: on a machine that does other work, time says nothing about correctness."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
