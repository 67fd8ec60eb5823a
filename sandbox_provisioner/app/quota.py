"""app/quota.py - a command of its own: `jupyter sandbox quota`, the limit of a work directory."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack

from traitlets import Bool, Integer, Unicode

from sandbox_provisioner.app.command import COMMON_ALIASES, COMMON_FLAGS, SandboxCommand
from sandbox_provisioner.errors import COMMAND, HostError
from sandbox_provisioner.facilities.storage import quotas
from sandbox_provisioner.facilities.storage.facts import find_workdir_quota
from sandbox_provisioner.facilities.storage.wish import DiskWish
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.places import Asker, Place
from sandbox_provisioner.units import format_bytes, parse_bytes

_ALIASES = {**COMMON_ALIASES, "limit": "QuotaApp.limit", "inodes": "QuotaApp.inodes"}
_FLAGS = {
    **COMMON_FLAGS,
    "clear": ({"QuotaApp": {"clear": True}}, "Let it have no limit any more."),
    "json": ({"QuotaApp": {"json_output": True}}, "Print JSON."),
}


class QuotaApp(SandboxCommand):
    """Shows, sets or clears the limit of one directory."""

    usage = "jupyter sandbox quota [DIR] [--limit SIZE] [--inodes NUMBER] [--clear] [--json]"
    description = (
        "How much a directory may hold that has been a work directory with workdir_limit, and how "
        "much it does. The limit stays when kernels have ended: set another one here, which the "
        "next start with workdir_limit changes again, or clear it. A directory with very many "
        "files gets its first limit here, since a start does not wait for so long. For root."
    )
    examples = """
    sudo jupyter sandbox quota /home/alice
    sudo jupyter sandbox quota /home/alice --limit 50G
    sudo jupyter sandbox quota /home/alice --clear
    """
    limit = Unicode("", help='How much it may hold, such as "50G".').tag(config=True)
    inodes = Integer(None, allow_none=True, help="How many files, directories and links.").tag(
        config=True
    )
    clear = Bool(False, help="Let it have no limit any more.").tag(config=True)
    json_output = Bool(False, help="Print JSON.").tag(config=True)
    aliases = _ALIASES
    flags = _FLAGS

    def start(self) -> None:
        """Called once by `main`; HostError where there can be no limit."""
        if len(self.extra_args) > 1:
            raise self.wrong("write one directory, or none for this one")
        host = HostFacts.probe()
        if not host.privileged:
            raise HostError(
                attempt="look at the limit of a work directory",
                answer="Linux tells only the machine's root of limits of projects",
                remedy=("Run it as root:", f"{COMMAND}sudo jupyter sandbox quota DIR"),
            )
        # Not its real path: whoever owns a directory on the way would say what is limited.
        path = os.path.join(os.getcwd(), *self.extra_args)
        with ExitStack() as opened:
            place = Place.open(path, Asker.of(0, ()), opened, attempt=f"look at {path}")
            if place.shows_host() or not place.is_directory:
                raise quotas.cannot(path, "it is no directory of files", "Name one.")
            self._change(place, host)
            self._show(place)

    def _change(self, place: Place, host: HostFacts) -> None:
        size = parse_bytes("--limit", self.limit) if self.limit else None
        wish = DiskWish(workdir_bytes=size, workdir_inodes=self.inodes)
        if self.clear and wish.limits_workdir:
            raise self.wrong("--clear excludes --limit and --inodes")
        if self.clear:
            quotas.release(place.fd, place.path)
            return
        wish.check_disk()
        quota = find_workdir_quota(wish, place, host.machine.kernel, privileged=host.privileged)
        if quota:
            quotas.hold(place.fd, quota, float("inf"))

    def _show(self, place: Place) -> None:
        held = quotas.look(place.fd, place.path)
        if self.json_output:
            print(json.dumps(as_json(place.source, held)))
        else:
            print(as_text(place.source, held))


def as_json(path: str, held: quotas.Held | None) -> dict[str, object]:
    """For programs: null without a limit."""
    return {
        "directory": path,
        "limit_bytes": (held and held.size_bytes) or None,
        "limit_inodes": (held and held.inodes) or None,
        "used_bytes": held.used_bytes if held else None,
        "used_inodes": held.used_inodes if held else None,
        "project": held.project if held else None,
        "is_own": held.is_own if held else None,
    }


def as_text(path: str, held: quotas.Held | None) -> str:
    """For people."""
    if held is None:
        return f"{path} has no limit of ours."
    size = format_bytes(held.size_bytes) if held.size_bytes else "no limit"
    files = str(held.inodes) if held.inodes else "no limit"
    text = (
        f"{path} holds {format_bytes(held.used_bytes)} of {size}, in {held.used_inodes} files of "
        f"{files} (project {held.project})."
    )
    return text if held.is_own else f"{text}\nIt is a part of a directory whose limit that is."
