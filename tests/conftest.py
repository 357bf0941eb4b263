"""One thread: the tests are many small operations, which threads only slow down."""

import torch

torch.set_num_threads(1)
