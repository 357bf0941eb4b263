"""Warnings that point to the user's line."""

import contextlib
import os
import sys
import warnings

import torch

_BETWEEN = (
    *(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__)),
    contextlib.__file__,
)


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called psfast, whatever frames of psfast and of torch lie between."""
    frame, level = sys._getframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
