"""Triton kernels and their launchers; imported as ``psfast.kernels``.

Importing this package imports no Triton. ``transformer`` holds the kernel from trial points to
differences of the loss, built of what ``tiles`` has; ``losses`` what becomes of them. ``plan`` has
the configurations, the weights' layout and the launches, ``descent`` the serial loop on the
device. ``python -m psfast.kernels.compile`` compiles all of them without a GPU.
"""
