"""A start's own variables, which whoever may start a kernel chooses: they lead nobody outside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager

from sandbox_provisioner.warm import ahead

pytestmark = pytest.mark.requires("userns", "gcc")

# Programs that a launcher, a server or a kernel may look for.
PROGRAMS = (
    "python", "python3", "sh", "bash", "git", "ip", "nft", "mount", "newuidmap", "newgidmap",
    "systemd-run", "ldconfig", "pip", "conda", "node", "uname", "squashfuse", "mkfs.ext4",
)  # fmt: skip
PRELOADED = """
#include <fcntl.h>
#include <stdio.h>
#include <sys/utsname.h>
#include <unistd.h>
__attribute__((constructor)) static void ran(void) {
    struct utsname us;
    int fd = open(RAN, O_WRONLY | O_APPEND);
    if (fd >= 0 && uname(&us) == 0)
        dprintf(fd, "preload %s\\n", us.nodename);
    close(fd);
}
"""


def planted(workdir: Path) -> dict[str, str]:
    """Variables that have whoever heeds them run something, which tells *workdir*/ran where that
    was."""
    place, ran = workdir / "planted", workdir / "ran"
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"

    def tells(what: str) -> str:
        where = "__import__('os').uname().nodename"
        return f"print('{what}', {where}, file=open({str(ran)!r}, 'a'), flush=True)"

    site = place / f"user/lib/{python}/site-packages"
    for folder in (place / "bin", site, place / "ipython/profile_default/startup"):
        folder.mkdir(parents=True)
    ran.touch(mode=0o666)
    ran.chmod(0o666)
    (place / "sitecustomize.py").write_text(tells("site"))
    (site / "usercustomize.py").write_text(tells("user"))
    (place / "startup.py").write_text(tells("startup"))
    (place / "jupyter_config.py").write_text(tells("config"))
    (place / "ipython/profile_default/startup/first.py").write_text(tells("profile"))
    told = f"echo program $(/bin/uname -n) >> {ran}\n"
    (place / "shell").write_text(told)
    for name in PROGRAMS:
        (place / "bin" / name).write_text(f"#!/bin/sh\n{told}")
        (place / "bin" / name).chmod(0o755)
    compiled = ["gcc", "-shared", "-fPIC", f'-DRAN="{ran}"', "-o", place / "it.so", "-xc", "-"]
    subprocess.run(compiled, input=PRELOADED, text=True, check=True)
    return {
        "LD_PRELOAD": f"{place}/it.so", "LD_LIBRARY_PATH": str(place),
        "PATH": f"{place}/bin:{os.environ['PATH']}", "BASH_ENV": f"{place}/shell",
        "PYTHONPATH": str(place), "PYTHONSTARTUP": f"{place}/startup.py",
        "PYTHONUSERBASE": f"{place}/user", "PYTHONINSPECT": "1", "PYTHONBREAKPOINT": "os.abort",
        "IPYTHONDIR": f"{place}/ipython", "JUPYTER_CONFIG_DIR": str(place),
        "JUPYTER_DEFAULT_PROVISIONER_NAME": "local-provisioner", "SANDBOX_FAIL_AT": "make-record",
        "GIT_EXEC_PATH": f"{place}/bin", "HOME": str(place),
    }  # fmt: skip


@pytest.mark.parametrize("warm", [False, True])
def test_what_variables_of_a_start_have_somebody_run_runs_in_the_box(
    kernel: Any, kernelspec: Any, workdir: Path, *, warm: bool
) -> None:
    options = {"env": {**os.environ, **planted(workdir)}, "cwd": str(workdir)}
    name = kernelspec(warm=warm)
    for _ in range(1 + warm):
        with kernel(KernelManager(kernel_name=name), start_options=options) as k:
            k.run("import subprocess; subprocess.run(['git', '--version'])")
            assert bool(k.provisioner.handle.record.nursery) == (warm and _ == 1)
        ahead.wait()
    ran = [line.split() for line in (workdir / "ran").read_text().splitlines()]
    assert {where for _, where in ran} == {"sandbox"}
    assert {what for what, _ in ran} >= {"preload", "site", "program"}
