"""nurseries.py - ends nurseries that others have: they wait for whoever comes next, for minutes."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from benchmarks import common
from sandbox_provisioner.inside import wire
from sandbox_provisioner.warm.found import SOCKET, call

_SECONDS = 30


def retire(folder: Path) -> None:
    """Have the one of the record *folder* end, as it does by itself when nobody has come for long
    enough; its spares end with it."""
    with contextlib.suppress(BlockingIOError):  # so many wait there already
        if channel := call(folder / SOCKET):
            with channel:
                channel.send(wire.message(wire.RETIRE))


def end_all(runtime: Path) -> bool:
    """Have all of the directory *runtime* end; whether whoever has them has removed what they were
    before long."""

    def are_gone() -> bool:
        for path in runtime.glob(f"*/{SOCKET}"):
            retire(path.parent)
        return not any(runtime.glob("*/owner"))

    return common.wait_until(are_gone, _SECONDS, time.sleep)
