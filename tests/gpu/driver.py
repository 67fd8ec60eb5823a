"""driver.py - a specification of this machine's GPUs as ``nvidia-ctk cdi generate`` writes one, for
machines where that is not installed: nodes, the driver's files, and the hooks that always come.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPECIFICATION = Path("/etc/cdi/sandbox-provisioner-tests.json")
NAME = "nvidia.com/gpu=0"
# Where NVIDIA's installers, Debian's packages and machines that mount a driver have its libraries.
_FOLDERS = ("/usr/local/nvidia/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib64")
_LIBRARY = re.compile(r"lib(cuda|cudadebugger|nvidia-[\w-]+|nvcuvid)\.so\.\d+\.\d+(\.\d+)?")
_PROGRAMS = ("nvidia-smi", "nvidia-debugdump", "nvidia-persistenced", "nvidia-cuda-mps-control")
_IN_CONTAINER = "/usr/lib/x86_64-linux-gnu"
_HOOK = "/usr/bin/nvidia-cdi-hook"


def write() -> None:
    """Into /etc/cdi, as root's alone."""
    SPECIFICATION.parent.mkdir(exist_ok=True)
    SPECIFICATION.write_text(json.dumps(specification(), indent=1))
    SPECIFICATION.chmod(0o644)


def specification() -> dict[str, Any]:
    """All GPUs of the machine by their numbers."""
    cards = sorted(Path("/dev").glob("nvidia[0-9]*"))
    shared = [path for path in ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools",
                                "/dev/nvidia-modeset") if os.path.exists(path)]  # fmt: skip
    links = [f"libcuda.so.1::{_IN_CONTAINER}/libcuda.so"]
    return {
        "cdiVersion": "0.5.0",
        "kind": "nvidia.com/gpu",
        "devices": [
            {"name": card.name[6:], "containerEdits": {"deviceNodes": [{"path": str(card)}]}}
            for card in cards
        ],
        "containerEdits": {
            "env": ["NVIDIA_VISIBLE_DEVICES=void"],
            "deviceNodes": [{"path": path} for path in shared],
            "mounts": [*_mounts()],
            "hooks": [
                _hook("create-symlinks", *(word for link in links for word in ("--link", link))),
                _hook("enable-cuda-compat", "--host-driver-version=580.0"),
                _hook("update-ldcache", "--folder", _IN_CONTAINER),
                _hook("disable-device-node-modification"),
            ],
        },
    }


def _hook(name: str, *words: str) -> dict[str, Any]:
    args = ["nvidia-cdi-hook", name, *words]
    return {"hookName": "createContainer", "path": _HOOK, "args": args}


def _mounts() -> Iterator[dict[str, Any]]:
    seen = set()
    for folder in filter(os.path.isdir, _FOLDERS):
        for name in sorted(os.listdir(folder)):
            if _LIBRARY.fullmatch(name) and name not in seen:
                seen.add(name)
                yield _mount(f"{folder}/{name}", f"{_IN_CONTAINER}/{name}")
    for folder in ("/usr/local/nvidia/bin", "/usr/bin"):
        for name in _PROGRAMS:
            if name not in seen and os.path.exists(f"{folder}/{name}"):
                seen.add(name)
                yield _mount(f"{folder}/{name}", f"/usr/bin/{name}")


def _mount(source: str, target: str) -> dict[str, Any]:
    options = ["ro", "nosuid", "nodev", "rbind", "rprivate"]
    return {"hostPath": source, "containerPath": target, "options": options}
