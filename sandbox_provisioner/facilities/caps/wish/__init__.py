"""wish - any process outside; pure: every cap that a sandbox can have, each in a file of its own.

A new one is a file like the others, and its three names below.
"""

from __future__ import annotations

from dataclasses import dataclass

from sandbox_provisioner.facilities.caps.wish.cap import Cap, Write
from sandbox_provisioner.facilities.caps.wish.cpu import Cpu, CpuOptions, CpuWish
from sandbox_provisioner.facilities.caps.wish.cpuset import Cpuset, CpusetOptions, CpusetWish
from sandbox_provisioner.facilities.caps.wish.io import Io, IoOptions, IoWish
from sandbox_provisioner.facilities.caps.wish.memory import Memory, MemoryOptions, MemoryWish
from sandbox_provisioner.facilities.caps.wish.pids import Pids, PidsOptions, PidsWish
from sandbox_provisioner.facilities.caps.wish.swap import Swap, SwapOptions, SwapWish

__all__ = [
    "BY_FACILITY",
    "CAPS",
    "CONTROLLERS",
    "FACILITIES",
    "Cap",
    "CapOptions",
    "Wishes",
    "Write",
]

# In the order in which they are told and written. Where two write the same file, the later one
# counts.
CAPS: tuple[Cap, ...] = (Memory(), Swap(), Cpu(), Cpuset(), Pids(), Io())


class CapOptions(MemoryOptions, SwapOptions, CpuOptions, CpusetOptions, PidsOptions, IoOptions):
    """What users write of all caps."""


@dataclass(frozen=True, kw_only=True)
class Wishes(MemoryWish, SwapWish, CpuWish, CpusetWish, PidsWish, IoWish):
    """What that comes to. None means no cap."""


BY_FACILITY = {cap.facility: cap for cap in CAPS}
# What an administrator may accept to do without, by the names of `on_missing`'s keys. Namespaces,
# the root file system and the system call filter are not among them.
FACILITIES = tuple(BY_FACILITY)
CONTROLLERS = tuple(dict.fromkeys(cap.controller for cap in CAPS))
