"""How much memory a chunk of trial points may take."""

import torch

from psfast.checks import check_count

_SHARE = 4  # of the free memory, one part in so many is the default


def checked_workspace(workspace: int | None, device: torch.device) -> int:
    """The bytes asked for, or the default for None.

    Raises TypeError unless it is an integer, ValueError for less than one.
    """
    check_count("workspace", workspace, optional=True)
    return free_bytes(device) // _SHARE if workspace is None else workspace


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 4 << 30  # not Linux: assume that a workspace of a quarter of this is there
