"""Property tests draw the same examples on every run, so that a red run comes of a change; `make fuzz` draws others."""

from hypothesis import settings

settings.register_profile("fixed", derandomize=True)
settings.register_profile("random", derandomize=False, print_blob=True)
settings.load_profile("fixed")
