"""variables.py - pure: the environment of a kernel, from an allow-list and from its caps.

A server's environment holds tokens and keys (JUPYTERHUB_API_TOKEN, AWS_*, SSH_AUTH_SOCK), and
front ends hand all of it on to the kernel. What a caller set *for this kernel*, and what its
kernel.json sets, is kept; what was merely inherited has to be on the list.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from fnmatch import translate
from functools import lru_cache
from types import MappingProxyType

from sandbox_provisioner.spec import Limits, Network

# What programs need to find their files and to speak the user's language.
INHERITED = (
    "LANG", "LANGUAGE", "LC_*", "TZ", "TERM", "COLORTERM", "NO_COLOR", "FORCE_COLOR", "CLICOLOR*",
    "PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHASHSEED", "PYTHONUTF8", "PYTHONIOENCODING",
    "PYTHONWARNINGS", "PYTHONUNBUFFERED", "PYTHONNOUSERSITE", "PYDEVD_*", "VIRTUAL_ENV",
    "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "R_HOME", "R_LIBS*", "JULIA_*", "JAVA_HOME", "MPLBACKEND",
    "OMP_*", "MKL_*", "OPENBLAS_*", "NUMEXPR_*", "NUMBA_*", "VECLIB_*", "POLARS_MAX_THREADS",
    "JPY_SESSION_NAME",
)  # fmt: skip
# Of these, what leads to files: those of the host, where the root is another one.
_OF_HOST = (
    "PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV",
    "R_HOME", "R_LIBS*", "JULIA_*", "JAVA_HOME",
)  # fmt: skip
# Set from the sandbox itself, never from outside.
_OWN = ("HOME", "USER", "LOGNAME", "SHELL", "HOSTNAME", "TMPDIR", "XDG_*", "JPY_PARENT_PID")
# What programs set in their own process for themselves alone.
_OF_PROGRAMS = ("JUPYTER*", "JPY_*", "PYTEST_*", "_*")
# Who takes the machine's CPUs for the kernel's, and looks here first. (dask, duckdb and Node.js
# have no such variable: they read the files of `files_from_caps`.)
_CPU_COUNTS = {
    "PYTHON_CPU_COUNT": "os.cpu_count() and all who ask it, since Python 3.13",
    "OMP_NUM_THREADS": "OpenMP: scikit-learn, xgboost, torch, pyarrow",
    "MKL_NUM_THREADS": "Intel's BLAS",
    "OPENBLAS_NUM_THREADS": "numpy's and scipy's BLAS",
    "BLIS_NUM_THREADS": "another BLAS",
    "NUMEXPR_NUM_THREADS": "numexpr, pandas.eval",
    "NUMEXPR_MAX_THREADS": "the same, which warns without it",
    "NUMBA_NUM_THREADS": "numba",
    "POLARS_MAX_THREADS": "polars",
    "RAYON_NUM_THREADS": "programs in Rust: tokenizers",
    "LOKY_MAX_CPU_COUNT": "joblib, scikit-learn's n_jobs=-1",
    "JULIA_CPU_THREADS": "Julia's Sys.CPU_THREADS",
    "MC_CORES": "R's parallel",
    "GOMAXPROCS": "programs in Go",
    "TF_NUM_INTRAOP_THREADS": "TensorFlow, within an operation",
    "TF_NUM_INTEROP_THREADS": "the same, for operations side by side",
}
_GROUP = "/sys/fs/cgroup"
# cgroup-v2.rst, cpu.max: so many microseconds of a period of this length.
_PERIOD_US = 100_000
# Who would try again and again to reach a network that is not there: each is told, in its own way,
# and says so at once. What lies in files, or was fetched before, still works.
_OFFLINE = {
    "PIP_RETRIES": "0",  # five tries with growing pauses, a minute in all
    # Not PIP_NO_INDEX, which it would tell as a package that does not exist; it prints where it
    # looks.
    "PIP_EXTRA_INDEX_URL": "https://this-sandbox-has-no-network.invalid/simple",
    "UV_OFFLINE": "1",
    "CONDA_OFFLINE": "1",
    "npm_config_offline": "true",
    "CARGO_NET_OFFLINE": "true",
    "JULIA_PKG_OFFLINE": "true",
    "HF_HUB_OFFLINE": "1",
}
# What tells programs where files are, how many threads to use, what language to speak, and that
# there is no network: none of it is a command, or names what is imported (as PYTHONWARNINGS does).
HARMLESS = (
    *(name for name in INHERITED if name not in {"PYTHONWARNINGS", "MPLBACKEND", "JULIA_*"}),
    *_OWN, *_CPU_COUNTS, *_OFFLINE, "MEM_LIMIT", "CPU_LIMIT", "PYTHONUSERBASE",
    "PYTHONDONTWRITEBYTECODE",
)  # fmt: skip
_LIBRARIES = "LD_LIBRARY_PATH"
_PATH = "/usr/local/bin:/usr/bin:/bin"
# What root inside has besides: programs by which packages set themselves up; nobody is there to
# answer their questions; pip takes a root for a mistake; and tar would give what it unpacks in the
# work directory to ids that it has nobody for there, or nobody outside can remove.
_PATH_OF_ROOT = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_OF_ROOT = {
    "DEBIAN_FRONTEND": "noninteractive",
    "PIP_ROOT_USER_ACTION": "ignore",
    "TAR_OPTIONS": "--no-same-owner",
}
# The rest of R's memory is not of its vectors.
_R_PART = 0.8


def handed_on(
    wanted: Mapping[str, str],
    server: Mapping[str, str],
    kept: Iterable[str],
    *,
    own_root: bool = False,
) -> dict[str, str]:
    """What of *wanted* the kernel gets; the words are those of `kernel_environment`."""
    usual = (name for name in INHERITED if not own_root or name not in _OF_HOST)
    own, inherited = _pattern(_OWN), _pattern((*usual, *kept))
    return {
        name: value
        for name, value in wanted.items()
        if not own.match(name)
        and (server.get(name) != value or inherited.match(name))
        and "\0" not in value
    }


def kernel_environment(
    wanted: Mapping[str, str],
    server: Mapping[str, str],
    *,
    kept: Iterable[str],
    limits: Limits,
    network: Network,
    home: str,
    hostname: str,
    own_root: bool = False,
    is_root: bool = False,
    found: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """What the kernel gets of *wanted*, the environment that the caller asked for.

    *server* is the server's own environment; *kept* are more names or patterns (``env_keep``), and
    *found* is what tells where the user's own packages are. With *own_root* the host's files do not
    show; *is_root* is who is root in such a box.
    """
    environment = handed_on(wanted, server, kept, own_root=own_root)
    asked = _pattern(tuple(kept))
    explicit = {n for n, v in environment.items() if server.get(n) != v or asked.match(n)}
    of_root = _OF_ROOT if is_root else {}
    for name, value in (_from_caps(limits) | _from_network(network) | of_root).items():
        if name not in explicit:
            environment[name] = value
    environment |= _with_their_own(environment, found)
    environment.setdefault("PATH", _PATH_OF_ROOT if is_root else _PATH)
    name = "root" if is_root else "jovyan"
    environment |= {
        "HOME": home,
        "USER": name,
        "LOGNAME": name,
        "SHELL": "/bin/bash",
        "HOSTNAME": hostname,
        # ipykernel's parent is PID 1 of its namespace: a value of 1 says so and keeps it from
        # watching for the death of a pid that means nothing here.
        "JPY_PARENT_PID": "1",
    }
    return environment


def _with_their_own(environment: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str]:
    """*found*, of which folders of libraries come after those that were asked for: CUDA's own, for
    one, which are newer than the driver's."""
    wanted = environment.get(_LIBRARIES)
    if not wanted or not found.get(_LIBRARIES):
        return dict(found)
    return {**found, _LIBRARIES: f"{wanted}:{found[_LIBRARIES]}"}


def set_and_left_out(
    wanted: Mapping[str, str], server: Mapping[str, str], began_with: bytes, kept: Iterable[str]
) -> list[str]:
    """The names in *wanted* that the server has set in its own process since it began, perhaps for
    its kernels, and that a kernel does not get. *began_with* is its environment then, as
    /proc/self/environ shows it; where a program has written its title there, nobody knows."""
    then = set(began_with.split(b"\0"))
    if not any(_entry(name, value) in then for name, value in server.items()):
        return []
    arrives, not_for_kernels = handed_on(wanted, server, kept), _pattern((*_OWN, *_OF_PROGRAMS))
    return sorted(
        name
        for name, value in wanted.items()
        if name not in arrives
        and not not_for_kernels.match(name)
        and _entry(name, value) not in then
    )


def _entry(name: str, value: str) -> bytes:
    return os.fsencode(f"{name}={value}")


@lru_cache
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """One expression for all patterns (fnmatch): a start asks it of every variable, twice. Of no
    names it is one that matches nothing."""
    return re.compile("|".join(translate(name) for name in names) or r"(?!)")


def _from_caps(limits: Limits) -> dict[str, str]:
    """JupyterHub's names for the caps, and what others read, who see no cap of ours."""
    variables, java = {}, []
    if limits.memory_bytes is not None:
        variables["MEM_LIMIT"] = str(limits.memory_bytes)
        # Its vectors then end with an error in the cell, not with the kernel.
        variables["R_MAX_VSIZE"] = str(round(limits.memory_bytes * _R_PART))
        java.append(f"-XX:MaxRAM={limits.memory_bytes}")
    if limits.cpu_cores is not None:
        variables["CPU_LIMIT"] = f"{limits.cpu_cores:g}"
    if limits.cpu_count is not None:
        variables |= dict.fromkeys(_CPU_COUNTS, str(limits.cpu_count))
        java.append(f"-XX:ActiveProcessorCount={limits.cpu_count}")
    if java:  # an older Java would end at what it does not know
        variables["JAVA_TOOL_OPTIONS"] = " ".join(["-XX:+IgnoreUnrecognizedVMOptions", *java])
    return variables


def files_from_caps(variables: Mapping[str, str]) -> dict[str, str]:
    """Files of the box, path and text, that tell what `_from_caps` tells by *variables*: as
    programs find them in a container with a cgroup namespace of its own (cgroup-v2.rst)."""
    files = {}
    if memory := _number(variables.get("MEM_LIMIT", "")):
        files[f"{_GROUP}/memory.max"] = f"{memory:.0f}\n"
    if cores := _number(variables.get("CPU_LIMIT", "")):
        files[f"{_GROUP}/cpu.max"] = f"{cores * _PERIOD_US:.0f} {_PERIOD_US}\n"
    return files


def _number(text: str) -> float:
    """0 for what is none: somebody may have set the variable to anything."""
    return float(text) if re.fullmatch(r"\d{1,18}(\.\d{1,6})?", text, re.ASCII) else 0.0


def _from_network(network: Network) -> dict[str, str]:
    return dict(_OFFLINE) if network is Network.NONE else {}
