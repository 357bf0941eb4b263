"""Work on a CUDA device as one graph."""

import functools
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import torch

_WARM_UP = 3  # runs before the capture, for the libraries' lazy initialisation


def captured(step: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """``step`` as a graph on ``device``; it runs some times before it is captured.

    Raises RuntimeError if it cannot be captured, as a step that waits for the device cannot.
    """
    with torch.cuda.device(device):
        caller, side = torch.cuda.current_stream(), _side_stream(device)
        side.wait_stream(caller)
        try:
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    step()
                with _no_host_sync():  # found here, it costs an exception; in a capture, much more
                    step()
        finally:
            caller.wait_stream(side)
    return _recorded(step, device)


def _recorded(step: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """``step``, which has run before, as a graph; it is not run now."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        caller, side = torch.cuda.current_stream(), _side_stream(device)
        try:
            with _capture(graph, side):
                step()
        except BaseException:
            # What torch leaves behind: its stream, and until 2.12 a random state that believes
            # it is captured, so that the next draw and all graphs from before would fail. The end
            # of another capture puts that right. (These graphs would not follow another state.)
            torch.cuda.set_stream(caller)
            if torch.__version__ < "2.13":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch warns of an empty graph
                    with _capture(torch.cuda.CUDAGraph(), side):
                        pass
            raise
    return graph


def _capture(graph: torch.cuda.CUDAGraph, side: torch.cuda.Stream):
    # Other threads may go on meanwhile, a DataLoader's that pins memory say.
    return torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local")


class Repeated:
    """The same step on ``device`` again and again: on a GPU one graph from its second run on,
    which costs the host some ten microseconds, however many kernels it launches.

    The step must use the same memory each time, and never wait for the device.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._is_recordable = False  # the first run compiles and loads what it needs
        self._replay: Callable[[], None] | None = None

    def __call__(self, step: Callable[[], None]) -> None:
        if self._replay is None and self._is_recordable:
            self._replay = _recorded(step, self._device).replay
        if self._replay is None:
            step()
            self._is_recordable = self._device.type == "cuda"
        else:
            self._replay()


class Beside:
    """Work on ``device`` that runs beside what comes after it, in a capture as well.

    ``with beside: ...`` launches it; what comes after ``beside.join()`` waits for it.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._inside: torch.cuda.StreamContext | None = None

    def __enter__(self) -> None:
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            self._inside = torch.cuda.stream(self._stream)
            self._inside.__enter__()

    def __exit__(self, *error) -> None:
        if self._stream:
            self._inside.__exit__(*error)

    def join(self) -> None:
        if self._stream:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: the libraries keep work space for each stream. Not torch's own one
    for captures: that is on the device that captured first."""
    return torch.cuda.Stream(device)


@contextmanager
def _no_host_sync():
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it does not see every such operation
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
