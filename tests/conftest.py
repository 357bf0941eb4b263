"""One thread: the tests are many small operations, which threads only slow down.

In CI hypothesis tries the same examples every time: what it finds by luck it finds elsewhere.
"""

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
