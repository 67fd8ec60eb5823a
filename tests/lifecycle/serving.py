"""serving.py - a process of its own, which a round may kill: starts kernels as a server does.

Reads a word a line, answers with a line of JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from jupyter_client.manager import KernelManager

from sandbox_provisioner.warm import ahead

REPLY_SECONDS = 20
_kernels: list[Any] = []


def start(kind: str) -> str:
    """Start a kernel of this kind and let it compute: "ran", or what failed."""
    manager = KernelManager(kernel_name=kind)
    try:
        manager.start_kernel()
        client = manager.client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=REPLY_SECONDS)
            client.execute_interactive("6 * 7", timeout=REPLY_SECONDS, output_hook=lambda _: None)
        finally:
            client.stop_channels()
    except Exception as error:
        if manager.has_kernel:
            manager.shutdown_kernel(now=True)
        return f"failed: {type(error).__name__}: {error}"
    _kernels.append(manager)
    return "ran"


def prepare(_: str) -> str:
    """Wait until a nursery, and what spares are wanted, are there."""
    ahead.wait()
    return "prepared"


def stop(_: str) -> str:
    """End all kernels."""
    while _kernels:
        _kernels.pop().shutdown_kernel(now=True)
    return "stopped"


def main() -> None:
    """Obey until the end of stdin."""
    verbs = {"start": start, "prepare": prepare, "stop": stop}
    for line in sys.stdin:
        verb, _, word = line.strip().partition(" ")
        print(json.dumps(verbs[verb](word)), flush=True)
    stop("")
    ahead.end_own()


if __name__ == "__main__":
    main()
