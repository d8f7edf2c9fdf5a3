"""The peak of a process's memory, as Linux has it."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

QUIET = {
    # What is freed goes back to the system at once. Else glibc raises its threshold with every large block that is freed
    # and keeps up to twice that at the heap's top, and the peak tells of the allocator's history and not of what is held.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
"""The environment of a process whose peak is measured."""


def resident(field: str) -> int:
    """Return VmHWM, the peak, or VmRSS of this process, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Let VmHWM begin again where memory stands, if the system permits it, and return it."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident("VmHWM")
