"""Triton kernels and their launchers; imported as ``psfast.kernels``.

Importing this package imports no Triton: ``psfast.kernels.transformer`` holds the kernels,
``psfast.kernels.plan`` their configurations, the weights' layout and the launches, and
``python -m psfast.kernels.compile`` compiles all of them without a GPU.
"""
