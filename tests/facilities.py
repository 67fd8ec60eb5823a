"""facilities.py - in the test process: what of a host a test can require, and why it is missing.

Each function answers "" where this host has the facility, and otherwise why it has not.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import disks

from sandbox_provisioner.facilities.caps.cgroup import survey
from sandbox_provisioner.facilities.network.facts.ipv6 import has_ipv6
from sandbox_provisioner.facilities.storage.facts import image_obstacle
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.trust import not_roots_in

MUST_WORK = "SANDBOX_MUST_WORK"


def _userns() -> str:
    obstacle = HostFacts.probe().obstacle
    if obstacle:
        return str(obstacle)
    return _answer_of("unshare", "--user", "true")


def _answer_of(*command: str) -> str:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except subprocess.CalledProcessError as error:
        return error.stderr.strip() or str(error)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return ""


def _root() -> str:
    facts = HostFacts.probe()
    return (
        ""
        if facts.privileged
        else f"uid {facts.caller.uid} has not the rights of the machine's root"
    )


def _loop() -> str:
    return image_obstacle(privileged=HostFacts.probe().privileged)


def _cgroup() -> str:
    return "" if survey().version else "no cgroup is usable: " + str(dict(survey().missing))


def _cgroup_version(number: int) -> Callable[[], str]:
    def version() -> str:
        found = survey().version
        return "" if found == number else f"this host's usable cgroups are of version {found}"

    return version


def _systemd() -> str:
    return "" if survey().manager else "no manager of systemd has to make our cgroups here"


def _systemd_booted() -> str:
    """sd_booted(3)."""
    booted = os.path.isdir("/run/systemd/system")
    return "" if booted else "systemd has not booted this machine"


def _controller(name: str) -> Callable[[], str]:
    return lambda: survey().missing.get(name, "")


def _module(name: str) -> Callable[[], str]:
    def module() -> str:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # of the package that it is in
            found = None
        return "" if found else f"no module {name} is installed"

    return module


def _program(*names: str) -> Callable[[], str]:
    def program() -> str:
        return "" if any(map(shutil.which, names)) else f"no {' or '.join(names)} on PATH"

    return program


def _network() -> str:
    """route(8): the default route's destination is 00000000."""
    lines = Path("/proc/net/route").read_text().splitlines()[1:]
    found = any(line.split()[1] == "00000000" for line in lines)
    return "" if found else "there is no default route"


def _kvm() -> str:
    return "" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "/dev/kvm cannot be opened"


def _apparmor_parser() -> str:
    """One that knows what our profile says, and the files that come with it."""
    if not shutil.which("apparmor_parser"):
        return "no AppArmor 4: no apparmor_parser on PATH"
    known = os.path.exists("/etc/apparmor.d/abi/4.0")
    return "" if known else "no AppArmor 4, whose parser knows user namespaces"


def public_python() -> str:
    """A Python new enough for us that every user may run, "" without one."""
    for program in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        version = "import sys; sys.exit(sys.version_info < (3, 11))"
        if _is_public(program) and not _answer_of(program, "-c", version):
            return program
    return ""


def packages() -> list[str]:
    """The folders of our packages, for that one, which may have none."""
    return [path for path in sys.path if path.endswith("site-packages")]


def _is_public(program: str) -> bool:
    """Whether others may execute it, and enter every folder above it."""
    real = Path(program).resolve()
    return real.exists() and all(p.stat().st_mode & 0o001 for p in (real, *real.parents))


def _public_python() -> str:
    return "" if public_python() else "no Python 3.11 or newer that every user may run"


def _landlock() -> str:
    return "" if HostFacts.probe().machine.landlock else "this Linux has no Landlock"


def ordinary_python() -> str:
    """A Python that an ordinary user may run and that can load our packages, "" without one."""
    program = public_python()
    same = f"import sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]!r})"
    return program if program and not _answer_of(program, "-c", same) else ""


def _ordinary_user() -> str:
    if os.geteuid():
        return ""
    if not shutil.which("setpriv"):
        return "no setpriv on PATH"
    return "" if ordinary_python() else "no Python of our version that every user may run"


def roots_python() -> str:
    """The broker imports nothing ahead of a kernel that others than root might have changed."""
    found = not_roots_in(
        (sys.prefix, str(Path(__file__).parents[1] / "sandbox_provisioner")), 1 << 20
    )
    return f"others than root may change {found}" if found else ""


_FACILITIES: dict[str, Callable[[], str]] = {
    "userns": _userns,
    "ipv6": lambda: "" if has_ipv6() else "this machine has no IPv6",
    "root": _root,
    "loop": _loop,
    "project-quotas": disks.obstacle,
    "btrfs": disks.btrfs_obstacle,
    "cgroup": _cgroup,
    "cgroup-memory": _controller("memory"),
    "cgroup-swap": _controller("swap"),
    "cgroup-cpu": _controller("cpu"),
    "cgroup-cpuset": _controller("cpuset"),
    "cgroup-pids": _controller("pids"),
    "cgroup-io": _controller("io"),
    "cgroup-v1": _cgroup_version(1),
    "cgroup-v2": _cgroup_version(2),
    "systemd": _systemd,
    "systemd-booted": _systemd_booted,
    "xeus": _module("xpython"),
    "bash_kernel": _module("bash_kernel"),
    "jupyter_server": _module("jupyter_server"),
    "jupyterhub": _module("jupyterhub"),
    "jupyterhub_idle_culler": _module("jupyterhub_idle_culler"),
    "configurable-http-proxy": _program("configurable-http-proxy"),
    "jupyterlab": _module("jupyterlab"),
    "matplotlib": _module("matplotlib"),
    "numpy": _module("numpy"),
    "pandas": _module("pandas"),
    "torch": _module("torch"),
    "gcc": _program("gcc"),
    "git": _program("git"),
    "nbclient": _module("nbclient"),
    "nbconvert": _module("nbconvert"),
    "papermill": _module("papermill"),
    "pytest_asyncio": _module("pytest_asyncio"),
    "pytest_jupyter": _module("pytest_jupyter"),
    "testpath": _module("testpath"),
    "towncrier": _module("towncrier"),
    "requests": _module("requests"),
    "websocket": _module("websocket"),
    "playwright": _module("playwright"),
    "chromium": _program("chromium", "chromium-browser", "google-chrome"),
    "bwrap": _program("bwrap"),
    "setpriv": _program("setpriv"),
    "openssl": _program("openssl"),
    "strace": _program("strace"),
    "cpython-tests": _module("test.test_threading"),
    "stress-ng": _program("stress-ng"),
    "unshare": _program("unshare"),
    "newuidmap": _program("newuidmap"),
    "mksquashfs": _program("mksquashfs"),
    "apt-get": _program("apt-get"),
    "dpkg": _program("dpkg"),
    "sqfstar": _program("sqfstar"),
    "mmdebstrap": _program("mmdebstrap"),
    "umoci": _program("umoci"),
    "mkfs.erofs": _program("mkfs.erofs"),
    "mkfs.ext4": _program("mkfs.ext4"),
    "squashfuse": _program("squashfuse"),
    "apparmor_parser": _apparmor_parser,
    "public-python": _public_python,
    "landlock": _landlock,
    "ordinary-user": _ordinary_user,
    "network": _network,
    "kvm": _kvm,
}


@cache
def missing(facility: str) -> str:
    """Why this host lacks *facility*, "" if it has it; KeyError for a name that is none."""
    return _FACILITIES[facility]()
