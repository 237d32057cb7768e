"""What holds for all tests.

Property tests draw the same examples on every run, so that a red run comes of a change; `make fuzz` draws others.
"""

import signal

from hypothesis import settings

settings.register_profile("fixed", derandomize=True)
settings.register_profile("random", derandomize=False, print_blob=True)
settings.load_profile("fixed")

# A script's background jobs ignore interrupts, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
