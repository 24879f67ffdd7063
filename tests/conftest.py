"""Settings that hold for every test, made before anything is imported."""

from __future__ import annotations

import os
import signal

# No test may reach a hub: a name that is not a folder has to fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# The models here are so small that a second thread only waits, for minutes if the machine is busy elsewhere. The test
# of batched solves sets its own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell that starts the tests in the background has them ignore Ctrl-C, which some tests send to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Waiting for the disk takes most of the time of a test with hundreds of checkpoints, and changes nothing that it reads.
# Processes that the tests start wait as usual, and tests of what is written durably put in their own.
os.fsync = lambda descriptor: None
