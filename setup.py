"""The packages: ``kernels/`` stands beside ``psfast/`` and is imported as ``psfast.kernels``."""

from setuptools import setup

setup(
    packages=["psfast", "psfast.objectives", "psfast.objectives.batched", "psfast.configs", "psfast.kernels"],
    package_dir={"psfast.kernels": "kernels"},
    package_data={"psfast.configs": ["*.yaml", "*/*.yaml"]},
)
