"""warm/keys.py - whoever launches; reads only: which nursery, and which spare, serves a request.

A key stands for all that kernels have from before the fork: one of a nursery for what they import
and are built from, one of a spare for its box and its caps as well.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import translate
from functools import lru_cache

import sandbox_provisioner
from sandbox_provisioner.facilities.environment.plan.variables import files_from_caps
from sandbox_provisioner.orders.variables import variables_for
from sandbox_provisioner.plan import CONNECTIONS, HOME, LaunchRequest, Site
from sandbox_provisioner.records import start_time
from sandbox_provisioner.spec import Limits

_MODULES = ("ipykernel_launcher", "ipykernel")
# Set in each kernel after the fork: no library reads them when it is loaded.
_LATE = (
    "HOME", "HOSTNAME", "JPY_SESSION_NAME", "MEM_LIMIT", "CPU_LIMIT", "PWD", "OLDPWD", "PATH",
    "TERM", "COLORTERM", "NO_COLOR", "FORCE_COLOR", "CLICOLOR*", "R_MAX_VSIZE", "JAVA_TOOL_OPTIONS",
)  # fmt: skip
# Of these, the ones that name a notebook: whoever serves another one must not know it.
_OF_ONE_NOTEBOOK = ("JPY_SESSION_NAME", "PWD", "OLDPWD")


@dataclass(frozen=True, slots=True)
class Command:
    """A command that a nursery can stand in for: ``PROGRAM [FLAGS] -m ipykernel_launcher
    ARGUMENTS``, or the same with ``-c CODE`` (which tests run)."""

    program: str
    flags: tuple[str, ...]

    @classmethod
    def of(cls, argv: tuple[str, ...]) -> Command | None:
        """The command in *argv*, None if it is another one."""
        flags = tuple(itertools.takewhile(_is_flag, argv[1:]))
        what, value = (*argv[len(flags) + 1 :], "", "")[:2]
        known = what == "-c" or (what == "-m" and value in _MODULES)
        return cls(argv[0], flags) if known else None


def _is_flag(word: str) -> bool:
    return word.startswith("-X") or word in {"-s", "-E", "-I", "-u"}


def of_no_notebook(environment: Mapping[str, str]) -> dict[str, str]:
    """*environment* without what one start alone knows: it stays in the memory of who had it."""
    return {name: v for name, v in environment.items() if name not in _OF_ONE_NOTEBOOK}


def this_process() -> str:
    """What tells this process from all others, for what is prepared for it alone."""
    return f"{os.getpid()} {start_time(os.getpid())}"


def is_usual(request: LaunchRequest) -> bool:
    """Whether the command line says nothing to the shell, so that it can be made before."""
    return request.argv[-4:-2] == ("-m", "ipykernel_launcher")


def bearable(request: LaunchRequest, site: Site, preload: tuple[str, ...]) -> tuple[str, ...]:
    """What of *preload* a nursery can import for *request*: nothing where its home is the work
    directory, since modules look for their folders there and a nursery has no such home; or where
    its command line has each kernel make a shell of its own, which modules may look at."""
    return preload if site.home == HOME and is_usual(request) else ()


def made_of(request: LaunchRequest, site: Site, preload: tuple[str, ...]) -> str:
    """What a nursery has to have been made of to serve *request*, as one word. Who launches for
    somebody else looks at no path of that one's here: a file system may never answer."""
    variables, preload = variables_for(request, site), bearable(request, site, preload)
    # Modules that a person named may look at any of them.
    late = _pattern(_OF_ONE_NOTEBOOK if preload else _LATE)
    command = Command.of(request.argv)
    parts = (
        command.flags if command else (),
        os.path.dirname(site.files.program),  # python and python3 there are one interpreter
        site.files.behind,
        (site.root.identity, site.files.freshness),
        site.files.readonly,
        site.facts.machine.system_files,
        sorted((name, v) for name, v in variables.items() if not late.fullmatch(name)),
        preload,
        (site.uid, site.gid),
        os.stat(sandbox_provisioner.__file__).st_mtime,
        str(site.facts.cgroups.bases),
        request.spec.network.mode,  # its filter allows what its children need for theirs
        bool(request.spec.devices),  # the same of theirs
        (site.facts.caller.uid, request.box),  # for nobody else, whoever launches
        request.terms is not None and _text_of(request.spec.limits),  # as a policy has it now
        request.below,  # whose memory its own is a part of
        sorted((name, _text_of(limits)) for name, limits in request.sums.items()),
    )
    return _digest(parts)


@lru_cache
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, names)))


def _text_of(limits: Limits) -> str:
    """The same in each process, which the order of a set's text is not."""
    return repr((replace(limits, by_default=frozenset()), sorted(limits.by_default)))


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def key_of(made: str, owner: str = "") -> str:
    """By what a nursery `made_of` this is found; *owner* is the one process that it belongs to, ""
    if it is for all of this user's."""
    return mark_of(owner) + _digest((made, owner))[:16]


def mark_of(owner: str) -> str:
    """What the keys of nurseries of *owner*, or of everybody's, begin with."""
    return _digest(owner)[:4]


def spare_key_of(request: LaunchRequest, site: Site, key: str) -> str:
    """By what a spare of the nursery *key* is found that can serve *request*: all but what it is
    bound to."""
    # The order of a set's text is each process's own.
    by_default = sorted(request.spec.limits.by_default)
    limits = replace(request.spec.limits, by_default=frozenset())
    spec = replace(request.spec, workdir=HOME, volumes=(), limits=limits, untouched=frozenset())
    name = request.connection_file[0] if request.connection_file else ""
    words = [word.replace(f"{CONNECTIONS}/{name}", CONNECTIONS) for word in request.argv[1:]]
    umask = site.facts.caller.umask
    box = (repr(spec), by_default, words, request.pump, request.logged, site.home, umask)
    # A name may lead to another device later, which a spare was not given.
    devices = [(node.path, node.major, node.minor, node.access) for node in site.devices.nodes]
    links = [(link.path, link.text) for link in site.devices.links]
    # They are made with the box, by variables that a nursery's key leaves out.
    told = sorted(files_from_caps(variables_for(request, site)).items())
    return _digest((key, *box, devices, links, told))[:16]
