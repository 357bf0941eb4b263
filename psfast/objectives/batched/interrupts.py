"""Ctrl-C at a moment when torch can be left: not inside of its own bookkeeping."""

import signal
import threading


class Uninterrupted:
    """Inside, Ctrl-C waits for the end; a second one does not.

    For pieces of up to seconds in which torch has a model's parameters exchanged, or a level of
    vmap on its stack: an exception at the wrong place of its clean-up would leave them so.
    """

    def __enter__(self) -> None:
        self._pressed = 0
        self._before = None
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if callable(before):  # not ignored
                self._before = before
                signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            if self._pressed:
                self._before(signal.SIGINT, None)

    def _note(self, signum, frame) -> None:
        self._pressed += 1
        if self._pressed > 1:
            self._pressed = 0
            self._before(signum, frame)
