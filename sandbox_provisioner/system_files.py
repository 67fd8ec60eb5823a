"""system_files.py - reads only, whoever launches: what of /etc and /var every kernel sees.

Lists of what may be shown, not of what may not: what programs need to work, is the same for every
user, and holds no secret. Left out on purpose is what administrators keep passwords and keys in
(pip.conf, npmrc, wgetrc, gitconfig, odbc.ini, profile.d, jupyter): who needs one of these asks for
it with `volumes`. passwd, group, hosts and their like are the box's own
(`facilities/ids/plan.py`, `facilities/network/plan/__init__.py`).
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from fnmatch import translate
from functools import lru_cache

SYSTEM_DIRECTORIES = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "nix/store")
# Names and patterns of them, as Debian, Fedora, Arch and SUSE have them.
_OF_ETC = (
    # the C library, shells, languages, time
    "alternatives", "bash.bashrc", "bashrc", "debian_version", "gai.conf", "inputrc", "ld.so.cache",
    "ld.so.conf", "ld.so.conf.d", "locale.alias", "locale.conf", "localtime", "lsb-release",
    "magic", "mime.types", "networks", "os-release", "protocols", "redhat-release", "rpc",
    "services", "terminfo", "timezone",
    # certificates
    "ca-certificates", "crypto-policies",
    # interpreters
    "dotnet", "java*", "julia", "ocamlfind.conf", "octave.conf", "openmpi*", "perl", "python3*",
    "R",
    # documents, pictures, browsers
    "chromium", "chromium.d", "dictionaries-common", "fonts", "ghostscript", "groff",
    "ImageMagick-*", "libpaper.d", "libreoffice", "man_db.conf", "manpath.config", "papersize",
    "paperspecs", "sgml", "texmf", "xml",
    # graphics and drivers
    "egl", "glvnd", "odbcinst.ini", "OpenCL", "vulkan",
)  # fmt: skip
# Of these a part only: the rest of ssl and pki are private keys.
_PARTS = (
    "/etc/ldap/ldap.conf", "/etc/pki/ca-trust", "/etc/pki/java", "/etc/pki/tls/cert.pem",
    "/etc/pki/tls/certs", "/etc/pki/tls/openssl.cnf", "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem", "/etc/ssl/certs", "/etc/ssl/openssl.cnf",
    # What packages make when they are installed, and programs in /usr have links to.
    "/var/cache/fontconfig", "/var/lib/aspell", "/var/lib/dictionaries-common", "/var/lib/gems",
    "/var/lib/ghc", "/var/lib/ghostscript", "/var/lib/libreoffice", "/var/lib/sgml-base",
    "/var/lib/texmf",
)  # fmt: skip
# What each box has of its own: nothing of the host's takes their place, whoever names it.
OF_BOX = (
    "/dev", "/proc", "/sys", "/etc/group", "/etc/hostname", "/etc/hosts", "/etc/nsswitch.conf",
    "/etc/passwd", "/etc/resolv.conf",
)  # fmt: skip
# Where a link at one of these places may lead to: nobody but the system writes there.
_TREES = ("/etc/", "/usr/", "/var/lib/", "/var/cache/", "/nix/store/", "/lib/", "/run/systemd/")


def system_tree() -> tuple[dict[str, str], tuple[str, ...]]:
    """The links of the root to the system's directories, such as /bin, and these directories."""
    links, directories = {}, []
    for name in SYSTEM_DIRECTORIES:
        path = f"/{name}"
        if os.path.islink(path):
            links[path] = os.readlink(path)
        elif os.path.isdir(path):
            directories.append(path)
    return links, tuple(directories)


def system_files() -> tuple[str, ...]:
    """Those of the lists that are there, and that every user may read and only root may change."""
    owner = os.stat("/usr").st_uid  # root; where root is not mapped, whatever it appears as
    return tuple(path for path in _listed("/etc") if _is_for_everybody(path, owner))


def _listed(etc: str) -> Iterator[str]:
    named, names = _pattern(_OF_ETC), list[str]()
    with contextlib.suppress(OSError):  # who may not list it has the parts
        names = sorted(os.listdir(etc))
    yield from (f"{etc}/{name}" for name in names if named.fullmatch(name))
    yield from _PARTS


@lru_cache
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, names)))


def _is_for_everybody(path: str, owner: int) -> bool:
    """Whether it belongs to *owner* and all may read and none but its group may write, judged by
    what is open."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        status, real = os.fstat(fd), os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    readable = 0o005 if stat.S_ISDIR(status.st_mode) else 0o004
    return (
        status.st_uid == owner
        and status.st_mode & readable == readable
        and not status.st_mode & stat.S_IWOTH
        and real.startswith(_TREES)
    )
