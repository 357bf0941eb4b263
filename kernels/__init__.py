"""Triton kernels and their launchers; imported as ``psfast.kernels``."""
