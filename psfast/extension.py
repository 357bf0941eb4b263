"""Finding the C++ extension ``psfast._C``, or building it.

``load`` makes its ops available: from the library that was built when psfast was installed
(``pip install --no-build-isolation``), else from one that is compiled at first use and kept in
the user's cache. Only torch's stable ABI is used, so one library serves torch 2.11 and later.

The module imports the standard library only: ``setup.py`` uses ``compile_library`` too.
"""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wno-psabi", "-Wno-uninitialized"),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]


@functools.lru_cache(maxsize=1)
def load() -> str | None:
    """Load the extension. Returns None, or the reason why there is none and how to get it."""
    import torch

    ready = _built_library()
    if ready is None:
        missing = _why_no_cached_library()
        if missing:
            return missing
        ready = _cached_library()
        if not ready.exists():
            print(
                f"psfast: compiling the fused evaluator, once, into {ready.parent}", file=sys.stderr
            )
            try:
                compile_library(ready)
            except (OSError, subprocess.CalledProcessError) as error:
                output = getattr(error, "stderr", None) or str(error)
                return f"the C++ extension did not compile: {output.strip()[-2000:]}"
    try:
        torch.ops.load_library(str(ready))
    except OSError as error:
        return f"the C++ extension does not load: {error.__cause__ or error}"
    return None


def status() -> tuple[bool, str]:
    """Whether the fused evaluator is ready, and how, or why not. Compiles nothing."""
    built = _built_library()
    reason = None if built else _why_no_cached_library()
    if not built and not reason and not _cached_library().exists():
        return True, f"not built yet: compiled at first use with {shlex.join(_compiler())}"
    reason = reason or load()
    if reason:
        return False, reason
    import torch

    how = "built ahead of time" if built else f"compiled at first use, {_cached_library()}"
    return True, f"{torch.ops.psfast.instruction_set()}, {how}"


def compile_library(target: Path, flags: Iterable[str] = ()) -> None:
    """Compile ``csrc/`` into the shared library ``target``.

    flags: further ones for the compiler and the linker

    Raises OSError without a compiler or a place to write, CalledProcessError with the
    compiler's words if it fails.
    """
    import torch

    compiler = _compiler()
    if compiler is None:
        raise OSError("no C++ compiler found: set CXX, or install g++ or clang++")
    root = Path(torch.__file__).parent
    flags = [*flags, f'-DPSFAST_SOURCES="{_fingerprint()}"']
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:

        def compile_one(source: Path) -> str:
            made = f"{folder}/{source.stem}.o"
            command = [*compiler, *_FLAGS, *flags, "-isystem", str(root / "include")]
            _run([*command, "-c", str(source), "-o", made])
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sorted(_sources().glob("*.cpp"))))
        made = f"{folder}/{target.name}"
        libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([*compiler, "-shared", *flags, *objects, *libraries, "-o", made])
        os.replace(made, target)  # whole or not at all, whoever else compiles meanwhile


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _compiler() -> list[str] | None:
    """The compiler's command: CXX, which may hold arguments ("ccache g++"), or the first found."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    return None


def why_no_build() -> str | None:
    """Why the extension cannot be compiled here, None if it can."""
    if _sources() is None:
        return "the C++ extension is not built and its sources (csrc/) are not installed"
    if sys.platform == "win32":
        return "the C++ extension builds with g++ or clang++ only, not on Windows"
    if _compiler() is None:
        named = os.environ.get("CXX")
        missing = f"CXX={named!r} names no program here" if named else "there is no C++ compiler"
        return (
            f"the C++ extension is not built and {missing}: install g++ or "
            "clang++ (or set CXX), or install psfast with --no-build-isolation where one is"
        )
    return None


def _why_no_cached_library() -> str | None:
    """Why the extension neither is in the user's cache nor can be compiled into it, None if it is
    or can; makes the folder."""
    reason = why_no_build()
    if reason or _cached_library().exists():
        return reason
    folder = _cached_library().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return (
            f"the C++ extension is not built, and compiled it could not be kept in {folder} "
            f"({error.strerror}): set XDG_CACHE_HOME to a folder that can be written"
        )
    return None


@functools.lru_cache(maxsize=1)
def _sources() -> Path | None:
    """``csrc/``, beside the package in a checkout and inside it when installed."""
    for folder in (_HERE.parent / "csrc", _HERE / "csrc"):
        if (folder / "ops.cpp").exists():
            return folder
    return None


@functools.lru_cache(maxsize=1)
def _fingerprint() -> str:
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for path in sorted(_sources().glob("*.[ch]*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _built_library() -> Path | None:
    """The library built at installation, unless the sources beside it have changed since.

    PSFAST_LIBRARY names another one to take instead (``make test-sanitize`` does).
    """
    if os.environ.get("PSFAST_LIBRARY"):
        return Path(os.environ["PSFAST_LIBRARY"])
    for path in sorted(_HERE.glob("_C*.so")):
        if _sources() is None or _fingerprint().encode() in path.read_bytes():
            return path
    return None


def _cached_library() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "psfast" / f"_C-{_fingerprint()}-{platform.machine()}.so"
