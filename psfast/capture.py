"""Work on a CUDA device as one graph."""

from collections.abc import Callable

import torch


def captured(step: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """``step``, captured on ``device``; it has run there before, so that nothing is left to load.

    Raises RuntimeError if it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        # Torch's own stream for captures is on the device that captured first. And only this
        # thread is held back meanwhile: another one, of a DataLoader, may be pinning memory.
        how = {"stream": torch.cuda.Stream(), "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, **how):
            step()
    return graph
