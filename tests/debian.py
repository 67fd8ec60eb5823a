"""debian.py - in the test process: a small root with apt and dpkg, and an archive for it.

Both are made of this very machine's programs, in a second; nothing is downloaded, and what apt here
is configured for is not looked at.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from functools import cache
from pathlib import Path

import roots

_PROGRAMS = (
    "apt-get", "apt-config", "chgrp", "chown", "diff", "dpkg", "dpkg-deb", "dpkg-query",
    "dpkg-split", "dpkg-statoverride", "grep", "groupadd", "ldconfig", "ln", "setpriv",
    "start-stop-daemon", "stat", "tar", "useradd",
)  # fmt: skip
_METHODS = ("copy", "file", "store")
_DPKG = ("info", "parts", "triggers", "updates", "alternatives")
_FOLDERS = (
    "etc/apt/apt.conf.d", "etc/apt/preferences.d", "etc/apt/trusted.gpg.d", "etc/default",
    "etc/dpkg/dpkg.cfg.d", "usr/lib/apt/methods", "usr/sbin", "var/cache/apt/archives/partial",
    "var/lib/apt/lists/partial", "var/log/apt", *(f"var/lib/dpkg/{name}" for name in _DPKG),
)  # fmt: skip
_USERS = "root:x:0:0:root:/root:/bin/sh\n_apt:x:42:65534::/nonexistent:/usr/sbin/nologin\n"
# Where the archive shows in a box.
ARCHIVE = "/srv/archive"
# A package as many are: with a user of its own, a set-user-ID program and a script that runs.
_SCRIPT = """#!/bin/sh
set -e
useradd --system --user-group --no-create-home greeter
mkdir -p /var/lib/greeter
chown greeter:greeter /var/lib/greeter
chmod 2750 /var/lib/greeter
echo configured > /var/lib/greeter/state
"""


@cache
def directory() -> Path:
    """The root. Nobody changes it."""
    root = roots.copy("debian")
    for name in _FOLDERS:
        (root / name).mkdir(parents=True, exist_ok=True)
    added = []
    for name in _PROGRAMS:
        added.append(root / f"usr/bin/{name}")
        shutil.copy(str(shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")), added[-1])
    for name in _METHODS:
        added.append(root / f"usr/lib/apt/methods/{name}")
        shutil.copy(f"/usr/lib/apt/methods/{name}", added[-1])
    roots._copy_libraries(root, added)
    for name, text in (("passwd", _USERS), ("group", "root:x:0:\nnogroup:x:65534:\n")):
        (root / f"etc/{name}").unlink()
        (root / f"etc/{name}").write_text(text)
    for name in ("shadow", "gshadow", "login.defs", "apt/sources.list"):
        (root / f"etc/{name}").write_text("")
    (root / "etc/apt/sources.list").write_text(f"deb [trusted=yes] file:{ARCHIVE} ./\n")
    shutil.copytree("/usr/share/dpkg", root / "usr/share/dpkg")
    for name in ("status", "available"):
        (root / f"var/lib/dpkg/{name}").touch()
    return root


def _greeter(folder: Path) -> Path:
    """The tree of the package "greeter"."""
    for name in ("usr/bin", "DEBIAN"):
        (folder / name).mkdir(parents=True)
    (folder / "usr/bin/greet").write_text("#!/bin/sh\necho hello\n")
    (folder / "usr/bin/greet").chmod(0o755)
    shutil.copy(str(shutil.which("id")), folder / "usr/bin/greeters-id")
    (folder / "usr/bin/greeters-id").chmod(0o4755)
    (folder / "DEBIAN/postinst").write_text(_SCRIPT)
    (folder / "DEBIAN/postinst").chmod(0o755)
    return folder


def archive(folder: Path) -> Path:
    """An archive in *folder* of the package "greeter", and of one that it needs."""
    packages = {"greeter": _greeter(folder / "greeter"), "greeter-data": folder / "data"}
    folder = folder / "archive"
    folder.mkdir()
    listed = []
    for name, tree in packages.items():
        control = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: nobody\n"
        control += "Depends: greeter-data\n" if name == "greeter" else ""
        control += "Description: a package of a test\n"
        (tree / "DEBIAN").mkdir(exist_ok=True, parents=True)
        (tree / "DEBIAN/control").write_text(control)
        command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        content = (folder / f"{name}_1_all.deb").read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        listed.append(
            f"{control}Filename: ./{name}_1_all.deb\nSize: {len(content)}\nSHA256: {digest}\n"
        )
    (folder / "Packages").write_text("\n".join(listed))
    return folder
