"""app/stop.py - a command of its own: `jupyter sandbox stop`.

What runs here is found by its record, so nobody who has started it needs to be there, or to answer;
what is left of it is for whoever that is to remove, and to tell of, or for the next start's sweep.
What a broker or a hub has for an ordinary user, that one is asked to stop. What another user's
server has started with that user's rights, root stops with no more than these: a record there is
that user's word. Who has these rights may also keep us from it; nobody waits for that.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence

from traitlets import Bool

from sandbox_provisioner import audit
from sandbox_provisioner.app.change import OnKernels
from sandbox_provisioner.app.command import COMMON_FLAGS, spoken
from sandbox_provisioner.app.network import find_sandbox
from sandbox_provisioner.app.running import (
    Sandbox,
    can_be_meant,
    look_at_broker,
    look_at_others,
    places_of_others,
)
from sandbox_provisioner.broker.launcher import stop_through
from sandbox_provisioner.descriptors import is_readable
from sandbox_provisioner.errors import COMMAND, HostError, SandboxError, told_as_host_error
from sandbox_provisioner.handle import reap, short_id
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.off_loop import off_loop, widen
from sandbox_provisioner.provisioner import user_name
from sandbox_provisioner.records import OF_NOBODY, SERVER, Record
from sandbox_provisioner.story import ROOT

_FLAGS = {"all": ({"StopApp": {"everything": True}}, "All that runs."), **COMMON_FLAGS}
_ENDED = {"ended", "left"}
_THREADS = 16  # a broker answers 32 of one user's questions at once
# What asks and kills takes 25 s where all of it takes long: a lock, SIGTERM, SIGKILL.
_CHILD_SECONDS = 30.0
_DEATH_SECONDS = 1.0  # Linux may let it wait for a file server even then
_HOW = {True: "has ended", False: "did not end when it was asked to, and was killed"}


class StopApp(OnKernels):
    """Ends kernels, whoever started them."""

    name = "jupyter sandbox stop"
    usage = "jupyter sandbox stop KERNEL ...|--user NAME|--group NAME|--all"
    description = (
        "End kernels, and with --user, --group or --all the servers of a hub's spawner too: each "
        "is asked to end (SIGTERM), and killed after five seconds. The person at the notebook "
        "reads who has stopped it, and it does not start again by itself. Root stops what runs "
        "for anybody, also what a broker or a hub has started that does not run any more; "
        "everybody else what runs for them, through a broker or a hub too. To have kernels keep "
        "what they have in memory: jupyter sandbox freeze."
    )
    examples = """
    jupyter sandbox stop 134530eb analysis.ipynb
    jupyter sandbox stop --group students
    jupyter sandbox stop --all
    """
    flags = _FLAGS
    act = "stop"
    everything = Bool(False, help="All that runs.").tag(config=True)
    _broker = ""

    def start(self) -> None:
        """Called once by `main`; the first error, or SystemExit with 1 of another user's kernel."""
        of_others: dict[int, list[Sandbox]] = {}
        ours: list[Sandbox] = []
        for one in self.meant(self.extra_args):
            (ours if one.owner is None else of_others.setdefault(one.owner, [])).append(one)
        # First, as children are forked, and we have no thread yet.
        children = {uid: _as_owner(uid, theirs) for uid, theirs in of_others.items()}
        errors = _stopped(ours, self._broker, ROOT if os.geteuid() == 0 else user_name())
        went_well = _all_ended(children)
        self.raise_first(errors)
        if not went_well:
            raise SystemExit(1)

    def meant(self, words: Sequence[str]) -> list[Sandbox]:
        """As with one word, with many, and with --all."""
        if sum(map(bool, (words, self.user, self.group, self.everything))) != 1:
            raise self.wrong("name kernels, or --user, or --group, or --all")
        if not words:
            return self.chosen()
        running = self.running()
        found = [find_sandbox(word, running) for word in words]
        return list({(one.owner, one.record.sandbox_id): one for one in found}.values())

    def running(self) -> list[Sandbox]:
        """With what a broker has for us, and for root what other users' servers have started."""
        found, provisioner = super().running(), self.provisioner()
        if os.geteuid() == 0 and not provisioner.runtime_dir:
            for uid, place in places_of_others():
                found += look_at_others(uid, place)
        elif os.geteuid() and os.path.exists(provisioner.broker_socket):
            self._broker = provisioner.broker_socket
            try:
                found += look_at_broker(self._broker)
            except SandboxError as error:
                print(spoken(str(error)), file=sys.stderr)
        return [
            one for one in found if one.state not in _ENDED and one.record.kind not in OF_NOBODY
        ]

    def whose(self, sandbox: Sandbox) -> str:
        """In a record of another user's any name may stand."""
        return super().whose(sandbox) if sandbox.owner is None else _account(sandbox.owner)[0]


def _account(uid: int) -> tuple[str, int]:
    """Its name, and its group; of one without a name, as if the group had its number."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return str(uid), uid
    return entry.pw_name, entry.pw_gid


def _as_owner(uid: int, found: Sequence[Sandbox]) -> int:
    """Stop *found*, which are the user *uid*'s, in a child that has the rights of that user alone;
    its pidfd. It has no right to write an audit."""
    for one in found:
        _note(uid, one.folder.name)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            name, gid = _account(uid)
            os.initgroups(name, gid)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            errors = _stopped(found, "", ROOT)
            for error in errors:
                print(spoken(str(error)), file=sys.stderr)
            status = 1 if errors else 0
        except Exception:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.pidfd_open(child)


def _note(uid: int, sandbox_id: str) -> None:
    """Nothing of what stands in its record, which is that user's word."""
    record = Record(sandbox_id=one_line(sandbox_id), person=_account(uid)[0], uid=uid)
    audit.changed(record, f"stopped by {ROOT}{_for_whom()}, with the rights of uid {uid}")


def _all_ended(children: Mapping[int, int]) -> bool:
    """Wait for *children*, pidfds by users, and kill those that stay: their users may stop them
    (SIGSTOP), or have them read what never answers. Whether all went well."""
    until, went_well = time.monotonic() + _CHILD_SECONDS, True
    for uid, pidfd in children.items():
        if not is_readable(pidfd, max(0.0, until - time.monotonic())):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            print(spoken(str(_kept_from_it(uid))), file=sys.stderr)
            is_readable(pidfd, _DEATH_SECONDS)
        went_well = reap(pidfd) == 0 and went_well
        os.close(pidfd)
    return went_well


def _kept_from_it(uid: int) -> HostError:
    name = one_line(_account(uid)[0])
    return HostError(
        attempt=f"stop what the servers of {name} have started",
        answer=f"the process that does it with the rights of {name} was kept from it for "
        f"{_CHILD_SECONDS:g} s, and was killed",
        remedy=("End all that runs as that user:", f"{COMMAND}pkill -KILL -U {uid}"),
    )


def _stopped(found: Sequence[Sandbox], broker: str, by: str) -> list[SandboxError]:
    """Stop *found* at once, those of the *broker* by asking that, and tell of each; what went
    wrong."""
    widen(_THREADS)
    outcomes = asyncio.run(_stop_all(found, broker, by))
    for sandbox, outcome in zip(found, outcomes, strict=True):
        if isinstance(outcome, bool):
            print(f"{_named(sandbox.record)} {_HOW[outcome]}.")
    return [outcome for outcome in outcomes if isinstance(outcome, SandboxError)]


async def _stop_all(found: Sequence[Sandbox], broker: str, by: str) -> list[bool | SandboxError]:
    return await asyncio.gather(*(_outcome(one, broker, by) for one in found))


async def _outcome(sandbox: Sandbox, broker: str, by: str) -> bool | SandboxError:
    """Of one, which keeps no other from its own. A user's record may name a process that is not
    that user's."""
    try:
        with told_as_host_error(f"stop kernel {short_id(sandbox.record)}"):
            return await _stop(sandbox, broker, by)
    except SandboxError as error:
        return error


async def _stop(sandbox: Sandbox, broker: str, by: str) -> bool:
    """Whether it ended by itself when it was asked to."""
    record = sandbox.record
    if not sandbox.folder.name:
        return await off_loop(stop_through, broker, record.sandbox_id)
    if not record.init_pid:
        raise HostError(
            attempt=f"stop kernel {short_id(record)}",
            answer="it is only starting",
            remedy="Try again in a moment.",
        )
    named = {"init_pid": record.init_pid, "init_start": record.init_start}
    card = {"id": sandbox.folder.name, "runtime_dir": str(sandbox.folder.parent), **named}
    handle = await off_loop(LocalLauncher(warn=_untold).find, card)
    try:
        if sandbox.owner is not None and not can_be_meant(handle.record):
            raise HostError(
                attempt=f"stop kernel {short_id(record)}",
                answer="its record tells by now what no sandbox has",
                remedy="See what its user runs: jupyter sandbox list",
            )
        await off_loop(audit.changed, record, f"stopped by {by}{_for_whom()}")
        return await handle.stop(by)
    finally:
        handle.let_go()


def _for_whom() -> str:
    """Who has become root to do it, as sudo(8) tells."""
    name = os.environ.get("SUDO_USER", "")
    return f" for {one_line(name)[:64]} (sudo)" if name and os.geteuid() == 0 else ""


def _untold(_: str) -> None:
    """Nothing is started."""


def _named(record: Record) -> str:
    server = record.kind == SERVER
    return one_line(f"The server of {record.user}" if server else f"Kernel {short_id(record)}")
