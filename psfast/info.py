"""``python -m psfast.info``: versions, devices, what is ready, and how to get what is not."""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable

import torch

import psfast

_TRAIN = "pip install 'psfast[train]'"
# distribution -> (what it is for, how to get it)
_PACKAGES = {
    "triton": ("fused GPU kernels", "pip install triton (Linux)"),
    "lightning": ("psfast.lightning, psfast-train", _TRAIN),
    "hydra-core": ("psfast-train", _TRAIN),
    "wandb": ("logger=wandb", _TRAIN),
    "tensorboard": ("logger=tensorboard", _TRAIN),
    "matplotlib": ("psfast.plots", _TRAIN),
}


def main() -> None:
    """Print the report; it needs nothing but torch."""
    print(f"psfast {psfast.__version__}, python {platform.python_version()}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    print(f"devices: {', '.join(_devices())}")
    print("\nbackends")
    for name, check in _BACKENDS.items():
        ready, detail = check()
        _line(name, ready, detail)
    print("\npackages")
    for name, (purpose, remedy) in _PACKAGES.items():
        version = _version(name)
        detail = f"{version}, for {purpose}" if version else f"for {purpose}: {remedy}"
        _line(name, version is not None, detail)


def _line(name: str, ready: bool, detail: str) -> None:
    print(f"  {name:<14}{'ready    ' if ready else 'not ready'}  {detail}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    names = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in gpus]
    return [f"cpu {platform.machine()}", *(names or ["no CUDA device"])]


def _always() -> tuple[bool, str]:
    return True, "any model or closure, any device"


def _fused_cpu() -> tuple[bool, str]:
    from psfast.extension import status

    return status()


def _fused_cuda() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "needs triton: pip install triton (Linux)"
    if not torch.cuda.is_available():
        return False, "needs a CUDA device"
    return True, f"triton {_version('triton')} on {torch.cuda.get_device_name(0)}"


def _graph() -> tuple[bool, str]:
    if not torch.cuda.is_available():
        return False, "needs a CUDA device"
    return True, "any closure that CUDA can capture"


_BACKENDS: dict[str, Callable[[], tuple[bool, str]]] = {
    "serial": _always,
    "batched": _always,
    "vmap": _always,
    "graph": _graph,
    "fused (CPU)": _fused_cpu,
    "fused (CUDA)": _fused_cuda,
}


if __name__ == "__main__":
    main()
