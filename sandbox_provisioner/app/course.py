"""app/course.py - a command of its own: `install --from`, a course's kernel in one file."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jupyter_client.kernelspec import KernelSpec
from traitlets import TraitError

from sandbox_provisioner.caller import Caller
from sandbox_provisioner.errors import SandboxError, SpecError
from sandbox_provisioner.images.store import find
from sandbox_provisioner.images.tree import is_plain
from sandbox_provisioner.images.written import Written
from sandbox_provisioner.option_errors import bad_value
from sandbox_provisioner.options import SandboxOptions, every_option
from sandbox_provisioner.policy.meaning import governed, parse
from sandbox_provisioner.policy.terms import Kind

_HEAD = ("name", "display_name", "kernel")
# What people may call our options.
_HINTS = {"image": "rootfs", "root": "rootfs", "memory": "mem_limit", "mem": "mem_limit",
          "cpus": "cpu_limit", "guests": "network_allow", "allow": "network_allow",
          "modules": "preload"}  # fmt: skip
# Of a folder of its own, beside those of others: not "." nor "..".
_KERNEL_NAME = re.compile(r"(?!\.)[a-z0-9._-]+")
_HOST = "host"
_USUAL = ("/usr/local/bin", "/usr/bin", "/bin")
# Of the Pythons in a root the one that has ipykernel is taken.
_ANY_PYTHON = "python3"


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What the file says: *options* of a sandbox, and of which *kernel* what is made of it."""

    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    display_name: str = ""
    kernel: str = ""


def read_course(path: str) -> Course:
    """The course in the file *path*; SpecError, with the line of what is wrong."""
    written = Written.read(path)
    known = every_option()
    written.know((*_HEAD, *known), _HINTS)
    options = {name: value for name, value in written.found.items() if name in known}
    for name, value in options.items():
        try:
            _check(name, value)
        except SandboxError as error:
            written.refuse_as((name,), error)
    folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
    name = written.text("name") or folder.lower().replace(" ", "-")
    if not _KERNEL_NAME.fullmatch(name):
        answer = f"{name!r} is no name for a kernel"
        written.refuse(("name",), answer, 'Write name = "...", of letters, digits and dashes.')
    return Course(
        options=options,
        name=name,
        display_name=written.text("display_name"),
        kernel=written.text("kernel"),
    )


@contextlib.contextmanager
def told_of(path: str) -> Iterator[None]:
    """Let what is wrong with all of it together be told as of the course in the file *path*, if
    there is one."""
    try:
        yield
    except SpecError as error:
        if not path:
            raise
        attempt = f"{error.attempt} (of {path})"
        raise SpecError(attempt=attempt, answer=error.answer, remedy=error.steps) from None


def _check(name: str, value: Any) -> None:
    """SpecError where the option *name* cannot have this *value*."""
    if name in governed():
        parse(Kind.FORCED, name, value)
        return
    options = SandboxOptions()
    try:
        setattr(options, name, value)
    except TraitError as error:
        raise bad_value(error, options.traits(config=True), {name: value}) from None


def in_its_root(kernel: KernelSpec, rootfs: str) -> KernelSpec:
    """*kernel* as it is started in another root than the host's: by the Python that is there."""
    if rootfs == _HOST or not os.path.basename(kernel.argv[0]).startswith("python"):
        return kernel
    python = _python_in(rootfs)
    # What is typed behind "!" is looked for where that Python is, too.
    folders = dict.fromkeys([*filter(None, [os.path.dirname(python)]), *_USUAL])
    changes = {"argv": [python, *kernel.argv[1:]],
               "env": {"PATH": ":".join(folders), **kernel.env}}  # fmt: skip
    found = KernelSpec(**{**kernel.to_dict(), **changes})
    found.resource_dir = kernel.resource_dir
    return found


def _python_in(rootfs: str) -> str:
    if not rootfs.startswith("/"):
        image, _ = find(rootfs, Caller.this_process())
        if not image.python:
            raise SpecError(
                attempt=f"install a kernel for the image {rootfs!r}",
                answer="there is no Python with ipykernel in it",
                remedy="Add ipykernel where the image is made, and import it anew.",
            )
        if not is_plain(image.python):
            raise SpecError(
                attempt=f"install a kernel for the image {rootfs!r}",
                answer=f"{image.python!r} is no path that a kernelspec can have",
                remedy="Make the image anew, with its Python in a folder of a plain name.",
            )
        return image.python
    return _ANY_PYTHON
