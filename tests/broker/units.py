"""units.py - in the test process, as root of a machine with systemd: the broker as its service, and
who asks it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from brokers import OBEY, User

UNITS = ("sandbox-broker.socket", "sandbox-broker.service")
COMMON = "jupyter-sandboxes.scope"
# With it a service keeps its processes out of the way of groups of its own.
KNOWS_DELEGATE_SUBGROUP = 254
TESTS = Path(__file__).parents[1]


def systemctl(*words: str) -> str:
    """What it says; it has to succeed."""
    command = ["systemctl", "--quiet", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def unit_of_groups() -> str:
    """Where the broker makes its groups with the systemd of this machine."""
    version = int(systemctl("--version").split()[1])
    return UNITS[1] if version >= KNOWS_DELEGATE_SUBGROUP else COMMON


@contextlib.contextmanager
def installed() -> Iterator[SimpleNamespace]:
    """The units as they are shipped, and where they have what."""
    words = [sys.executable, "-m", "sandbox_provisioner.app", "broker", "--install"]
    subprocess.run(words, cwd="/", check=True)
    systemctl("daemon-reload")
    systemctl("enable", "--now", UNITS[0])
    try:
        yield SimpleNamespace(
            socket="/run/sandbox-broker/socket",
            runtime=Path("/run/sandbox-provisioner"),
            home=Path("/home/alice"),
            group=Path("/sys/fs/cgroup/system.slice", unit_of_groups(), "sandbox-provisioner"),
        )
    finally:
        systemctl("disable", "--now", *UNITS)
        for unit in UNITS:
            Path("/etc/systemd/system", unit).unlink()
        systemctl("daemon-reload")
        if unit_of_groups() == COMMON:
            systemctl("stop", COMMON)


class Account(User):
    """As `User`, for who has an account: outside of any session, as a hub starts servers."""

    def __init__(self, name: str) -> None:
        identity = [f"--reuid={name}", f"--regid={name}", "--init-groups"]
        modules = [str(TESTS), str(TESTS / "broker")]
        self.process = subprocess.Popen(
            ["setpriv", *identity, sys.executable, "-u", "-c", OBEY],
            env={"PYTHONPATH": os.pathsep.join(modules), "PYTHONDONTWRITEBYTECODE": "1",
                 "HOME": f"/home/{name}", "PATH": os.defpath},
            cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
