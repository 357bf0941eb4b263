"""Warnings that point to the user's line."""

import contextlib
import os
import sys
import warnings

import torch

_BETWEEN = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called psfast, whatever frames of psfast and of torch lie between."""
    frame, level = sys._getframe(), 1
    while frame is not None and _lies_between(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _lies_between(file: str) -> bool:
    return file.startswith(_BETWEEN) or file == contextlib.__file__
