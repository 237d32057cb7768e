"""What holds for all tests.

Property tests draw the same examples on every run, so that a red run comes of a change; `make fuzz` draws others.
"""

import os
import signal

from hypothesis import HealthCheck, settings

# Before torch is imported, here and in the processes that tests start: several of them run at a time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No example has a deadline: what it takes depends on what else the machine does.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fixed", patient, derandomize=True)
settings.register_profile("random", patient, derandomize=False, print_blob=True)
settings.load_profile("fixed")

# A script's background jobs ignore interrupts, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
