"""Triton kernels and their launchers; imported as ``psfast.kernels``.

Importing this package imports no Triton. A trial point goes through ``points`` (what it changes),
``blocks`` (from there to the end of the last attention), ``tail`` (from there to what the loss
changes by) and ``losses`` (what becomes of that); ``tiles`` has what the two in the middle compute
with, ``weights`` how they find the weights. ``configs`` says how they are cut, ``plan`` launches
them, ``descent`` is the serial loop on the device. ``python -m psfast.kernels.compile`` compiles
all of them without a GPU.
"""
