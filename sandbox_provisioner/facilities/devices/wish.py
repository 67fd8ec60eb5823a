"""facilities/devices/wish.py - pure: which devices a kernel is asked to have, by their names.

A name is that of the Container Device Interface, "nvidia.com/gpu=0", or the path of a node. In a
policy it may be a pattern.
"""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase

from traitlets import HasTraits, List, Unicode

from sandbox_provisioner.errors import SpecError

MOST_DEVICES = 64
# A vendor, a class and a device of it; which ones there are only the machine knows.
_NAME = re.compile(r"[^\s/=]{1,253}/[^\s/=]{1,63}=[^\s/=]{1,253}")
_REMEDY = 'Write a name as "nvidia.com/gpu=0", or the path of a device such as "/dev/kvm".'


class DeviceOptions(HasTraits):
    """What users write."""

    devices = List(
        Unicode(),
        help='Devices of the host: by names of the Container Device Interface, "nvidia.com/gpu=0", '
        'or paths, "/dev/kvm", where a policy gives them (docs/devices.md).',
    ).tag(
        config=True,
        flag="device",
        fields=("devices",),
    )


def is_path(name: str) -> bool:
    """Whether it is that of a node."""
    return name.startswith("/")


def check(names: tuple[str, ...]) -> None:
    """Refuse what no device can be called; SpecError."""
    if len(names) > MOST_DEVICES:
        answer = f"{len(names)} devices are more than {MOST_DEVICES}"
        raise SpecError(attempt="read devices", answer=answer, remedy="Name fewer.")
    for name in names:
        plain = os.path.normpath(name) == name and name.isprintable()
        if not (plain if is_path(name) else _NAME.fullmatch(name)):
            answer = f"{name!r} is not a device"
            raise SpecError(attempt="read devices", answer=answer, remedy=_REMEDY)


def covers(wide: str, narrow: str) -> bool:
    """Whether the pattern *wide* of a policy has *narrow* in it; "*" stands for a part of one name
    of a path, and not for several."""
    parts = [re.split("[/=]", name) for name in (wide, narrow)]
    same_form = is_path(wide) == is_path(narrow) and len(parts[0]) == len(parts[1])
    return same_form and all(map(fnmatchcase, parts[1], parts[0]))
