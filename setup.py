"""The packages: ``kernels/`` stands beside ``psfast/`` and is imported as ``psfast.kernels``.

With torch importable (``--no-build-isolation``) and a C++ compiler the extension ``psfast._C``
is built here; otherwise psfast compiles ``csrc/`` at first use, or does without.
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

_spec = importlib.util.spec_from_file_location("extension", "psfast/extension.py")
extension = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(extension)


class BuildExtension(build_ext):
    """Compiles ``csrc/`` as the first use would: one way to build it."""

    def build_extension(self, ext):
        extension.compile_library(Path(self.get_ext_fullpath(ext.name)))


ready = importlib.util.find_spec("torch") and extension.why_no_build() is None

setup(
    packages=[
        "psfast",
        "psfast.objectives",
        "psfast.objectives.batched",
        "psfast.configs",
        "psfast.kernels",
        "psfast.csrc",
    ],
    package_dir={"psfast.kernels": "kernels", "psfast.csrc": "csrc"},
    package_data={"psfast.configs": ["*.yaml", "*/*.yaml"], "psfast.csrc": ["*.cpp", "*.h"]},
    ext_modules=[Extension("psfast._C", [], py_limited_api=True)] if ready else [],
    cmdclass={"build_ext": BuildExtension},
)
