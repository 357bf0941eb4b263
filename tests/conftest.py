"""One thread: the tests are many small operations, which threads only slow down.

Ctrl-C raises, here and in the commands that tests start, also where a shell that runs the suite in
the background has switched it off.

In CI hypothesis tries the same examples every time: what it finds by luck it finds elsewhere.
"""

import os
import signal

import torch
from hypothesis import settings

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
