"""installs.py - pure: what a kernel with a network can install, where to, and how it finds that.

Its environment is read-only, so that kernels cannot change each other's. What it installs lies in a
private home, is memory, and is gone with the kernel. ::

    an environment of its own (venv)   PIP_PREFIX, since pip refuses --user there; PYTHONPATH
    any other Python                   PYTHONUSERBASE, to which pip installs by itself what it may
                                       not write elsewhere
    R                                  R_LIBS_USER
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Protocol

from sandbox_provisioner.plan import HOME, OWN_BASE
from sandbox_provisioner.spec import Network, SandboxSpec, relative

BASE = OWN_BASE
_PROGRAMS = f"{BASE}/bin"
_R_LIBRARY = f"{HOME}/R/library"
_OF_SYSTEM = ("/usr/local/bin", "/usr/bin", "/bin")
_WITH_NETWORK = (Network.GATEWAY, Network.CARD)
_USUAL = {
    # What is downloaded once would be memory twice.
    "PIP_NO_CACHE_DIR": "1",
    # pip itself is of the environment.
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    # Of PEP 668: nothing of the system's can be broken here.
    "PIP_BREAK_SYSTEM_PACKAGES": "1",
}
# By these programs find the certificates that this machine trusts besides the usual ones.
CERTIFICATES = (
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS", "AWS_CA_BUNDLE", "NIX_SSL_CERT_FILE", "HTTPLIB2_CA_CERTS",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
)  # fmt: skip
# The same of what installers are told.
OF_FILES = ("PIP_CERT", "npm_config_cafile")


class OwnSite(Protocol):
    """See `facilities/environment/facts/kernel_files.py`."""

    @property
    def library(self) -> str:
        """The name of the folder of its library."""

    @property
    def base(self) -> str:
        """PYTHONUSERBASE outside, "" where it means nothing."""


def are_possible(spec: SandboxSpec) -> bool:
    """Whether there is somewhere to get packages from, or they are to be kept."""
    return spec.network.mode in _WITH_NETWORK or spec.keeps_layer


def r_library(spec: SandboxSpec) -> str:
    """Where R has them: with the others, where those are kept."""
    return f"{BASE}/R/library" if spec.keeps_layer else _R_LIBRARY


def folders(site: OwnSite | None, r_library: str = _R_LIBRARY) -> tuple[str, ...]:
    """Those that are there when the kernel's program starts: a Python looks for them once."""
    return (_PROGRAMS, *([_site_packages(site)] if site else []), r_library)


def _site_packages(site: OwnSite) -> str:
    return f"{BASE}/lib/{site.library}/site-packages"


def note(site: OwnSite | None) -> str:
    """The file that leads a Python on to packages elsewhere."""
    return f"{_site_packages(site)}/shown.pth" if site else ""


def note_of(outside: str) -> str:
    """Its text, by which also the .pth files in *outside* count (site.addsitedir)."""
    return f"import site; site.addsitedir({outside!r})\n"


def variables(
    environment: Mapping[str, str],
    program: str,
    site: OwnSite | None,
    told: Mapping[str, str],
    r_library: str = _R_LIBRARY,
) -> dict[str, str]:
    """What of the *environment* of a kernel that is *program* becomes another one; *told* is how
    this machine's own installers are configured. What was asked for this kernel stays as it is."""
    found = {name: value for name, value in {**_USUAL, **told}.items() if name not in environment}
    # The first pip and python of PATH may be another environment's.
    own = os.path.dirname(program)
    ahead = (_PROGRAMS,) if own in _OF_SYSTEM else (_PROGRAMS, own)
    found["PATH"] = _joined((*ahead, environment["PATH"]))
    found["R_LIBS_USER"] = _joined((r_library, environment.get("R_LIBS_USER", "")))
    if site is None or site.base:  # a shell may start a Python
        return found | {"PYTHONUSERBASE": BASE}
    modules = _joined((environment.get("PYTHONPATH", ""), _site_packages(site)))
    prefix = environment.get("PIP_PREFIX", BASE)
    return found | {"PIP_PREFIX": prefix, "PYTHONPATH": modules}


def of_certificates(
    wanted: Mapping[str, str], told: Mapping[str, str], shown: Iterable[str]
) -> dict[str, str]:
    """Where certificates are, of the variables *wanted* and what installers are *told*: all whose
    file or folder is *shown* inside."""
    named = {name: wanted[name] for name in CERTIFICATES if name in wanted}
    named |= {name: told[name] for name in OF_FILES if name in told}
    places = tuple(shown)
    return {
        name: path
        for name, path in named.items()
        if any(relative(path, place) is not None for place in places)
    }


def _joined(paths: Iterable[str]) -> str:
    return os.pathsep.join(filter(None, paths))
