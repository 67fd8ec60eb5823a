"""hub/persons.py - in the daemon, as root: what a hub that is not root may have for a person.

Nothing that it names is looked at with root's rights: the program, its libraries, the home and
volumes are found and opened by the person's eyes (`broker/eyes.py`), as they are for a kernel of
that person. What lies beyond these the administrator's policy has to name (`policy/hub.py`).
"""

from __future__ import annotations

import pwd
import re
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from sandbox_provisioner.broker.eyes import Eyes
from sandbox_provisioner.broker.peer import Peer
from sandbox_provisioner.broker.server_wish import ServerWish
from sandbox_provisioner.caller import Caller
from sandbox_provisioner.errors import COMMAND, HostError, SpecError
from sandbox_provisioner.facilities.ids.facts import FIRST_ID, LAST_ID, is_given_away
from sandbox_provisioner.facilities.workdir.facts.run_by_host import Server
from sandbox_provisioner.hub.servers import Rights
from sandbox_provisioner.launch import answered
from sandbox_provisioner.places import Asker, Place, open_for_another
from sandbox_provisioner.policy.hub import HubTerms
from sandbox_provisioner.policy.narrow import covers_volume
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.policy.policy import Policy
from sandbox_provisioner.spec import Volume, relative

_LOGIN_DEFS = Path("/etc/login.defs")
_FIRST_UID = 1000  # useradd(8), where that file does not say


def terms_of_hub(policy: Policy | None, file: str, peer: Peer) -> HubTerms:
    """What the *policy* of *file* says of the hub of the *peer*; HostError where that one is no
    hub's account."""
    hub = policy.hub if policy else None
    if hub and policy and _uid_of(hub.account) == peer.uid:
        return hub
    answer = f"the hub that {file} names runs as {hub.account}" if hub else f"{file} names no hub"
    raise HostError(
        attempt=f"have a server started through the sandbox broker, as {peer.name}",
        answer=answer,
        remedy=(
            f"Ask {policy.ask if policy else 'the administrator of this machine'} to write there, "
            "if this account is the hub's alone:",
            f"{COMMAND}[hub]",
            f'{COMMAND}account = "{peer.name}"',
        ),
    )


def _uid_of(name: str) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return -1


def check_person(name: str, hub_uid: int, hub: HubTerms) -> str:
    """The one name of that person, whom the system may know by several; HostError for whom the
    *hub* starts no server: an account of the system's, its own, or who is in none of its groups.
    Who is not there at all is told by who starts it."""
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        return name
    uid, answer = found.pw_uid, ""
    if uid == hub_uid:
        answer = "it is the account of the hub itself"
    elif uid < (first := _first_uid()):
        answer = (
            f"it is an account of the system's: its uid is {uid}, and people's begin at {first}"
        )
    elif FIRST_ID <= uid <= LAST_ID or is_given_away(uid):
        answer = f"uid {uid} is not a user's own, but one of those for sandboxes"
    elif hub.groups is not None and not hub.is_for(Person.find(found.pw_name).groups):
        answer = f"the hub is for the groups {', '.join(hub.groups)}, by the policy"
    if answer:
        raise HostError(
            attempt=f"start a server for {name}", answer=answer, remedy="Log in as another user."
        )
    return found.pw_name


def _first_uid() -> int:
    """login.defs(5): UID_MIN."""
    with suppress(OSError):
        if found := re.search(r"^\s*UID_MIN\s+(\d+)", _LOGIN_DEFS.read_text(), re.M):
            return max(1, int(found[1]))
    return _FIRST_UID


def as_person(
    hub: HubTerms,
    person: pwd.struct_passwd,
    always: tuple[Volume, ...],
    wish: ServerWish,
    opened: ExitStack,
) -> Rights:
    """The rights of the *person*, for the server that *hub* wishes; *always* is what root gives in
    any case."""
    who = Peer.of(person.pw_uid, person.pw_gid)
    eyes = Eyes.of(who)
    opened.enter_context(eyes.open())
    asker = Asker.of(who.uid, (), who.groups)
    by_path: dict[str, int] = {}
    granted = {volume: _opened_by_root(volume.source, opened) for volume in always}
    volumes = []
    for volume in wish.volumes:
        if place := _granted(volume, hub, person.pw_name, opened):
            volumes.append(replace(volume, source=place.source))
            granted[volumes[-1]] = place
            continue
        _, source, fd = eyes(_opened, volume.source, asker, opened)
        volumes.append(replace(volume, source=source))
        by_path[source] = fd
    home, _, fd = eyes(_opened, person.pw_dir, asker, opened)
    by_path[home] = by_path[person.pw_dir] = fd
    caller = Caller(
        uid=who.uid,
        gid=who.gid,
        home=person.pw_dir,
        cwd="/",
        umask=0o022,
        environment={},
        groups=who.groups,
        server=wish.server or Server(),
        opened=by_path,
        granted=granted,
    )
    return Rights(caller=caller, seen_by=eyes, volumes=tuple(volumes))


def _opened(path: str, asker: Asker, opened: ExitStack) -> tuple[str, str, int]:
    return open_for_another(path, asker, opened, attempt=f"show {path!r} to a server")


def _opened_by_root(path: str, opened: ExitStack) -> Place:
    """Root waits no longer than anybody else for who serves files."""

    def look() -> tuple[Place, ExitStack]:
        with ExitStack() as own:
            attempt = f"show {path!r} to a server"
            return Place.open(path, Asker.of(0, ()), own, attempt=attempt), own.pop_all()

    place, own = answered(look, lambda found: found[1].close(), (path,))
    opened.push(own)
    return place


def _granted(volume: Volume, hub: HubTerms, person: str, opened: ExitStack) -> Place | None:
    """What the policy gives the servers of that *person* by itself: no link in it leads elsewhere,
    whoever has made that. None for what it does not speak of."""
    for wide in hub.volumes_for(person):
        if not covers_volume(wide, volume):
            continue
        place = _opened_by_root(volume.source, opened)
        around = _opened_by_root(wide.source, opened)
        if relative(place.source, around.source) is not None:
            return place
        raise SpecError(
            attempt=f"show {volume.source!r} to a server",
            answer=f"it is {place.source}, which is not in {around.source}",
            remedy="Name that, if the policy lets servers have it.",
        )
    return None
