"""app/change.py - commands of their own: `jupyter sandbox limits`, `freeze` and `thaw`.

What runs is changed from outside, by the files of its groups and of its network namespace: nobody
who has started it needs to be there, or to answer. The record says what it has now, and its server
reads it there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from traitlets import Unicode

from sandbox_provisioner import audit
from sandbox_provisioner.app.command import COMMON_ALIASES, COMMON_FLAGS, SandboxCommand
from sandbox_provisioner.app.network import find_sandbox
from sandbox_provisioner.app.running import Sandbox, look, tell_later_versions
from sandbox_provisioner.errors import HostError, SandboxError, SpecError
from sandbox_provisioner.facilities.caps.cgroup import CgroupTree, open_existing
from sandbox_provisioner.facilities.network.card.cut import cut_off
from sandbox_provisioner.handle import short_id
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.policy.current import terms_of_this_process
from sandbox_provisioner.policy.meaning import parse
from sandbox_provisioner.policy.narrow import described, narrow
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.policy.terms import Kind
from sandbox_provisioner.records import OF_NOBODY, Record, RecordFolder, cgroup_facts, open_init
from sandbox_provisioner.spec import Limits, Network, SandboxSpec

_CAPS = {"mem": "mem_limit", "cpu": "cpu_limit", "pids": "pids_limit"}
_NETWORK = "network"
_UNTOLD = "; the interrupt before that stays where it was, as no server is left to move it"
_WORDS = "mem=4G, cpu=2, pids=100 and network=none"
_ALIASES = {"user": "OnKernels.user", "group": "OnKernels.group", **COMMON_ALIASES}


class OnKernels(SandboxCommand):
    """What is done to one kernel, or to all that run for somebody."""

    user = Unicode("", help="All that runs for this user.").tag(config=True)
    group = Unicode("", help="All that runs for members of this Unix group.").tag(config=True)
    aliases = _ALIASES
    flags = COMMON_FLAGS
    act: ClassVar[str] = ""

    def meant(self, words: Sequence[str]) -> list[Sandbox]:
        """The sandboxes that *words*, or the options, name; SpecError where there are none."""
        if len([*words, *filter(None, (self.user, self.group))]) != 1:
            raise self.wrong("name one kernel, or --user, or --group")
        return [find_sandbox(words[0], self.running())] if words else self.chosen()

    def running(self) -> list[Sandbox]:
        """Only those that we have started: what others write into their records is their word."""
        tell_later_versions(self.runtime())
        return [one for one in look(self.runtime()) if one.record.kind not in OF_NOBODY]

    def chosen(self) -> list[Sandbox]:
        """Those of the user or group that is named, or all; SpecError where there are none."""
        found = [one for one in self.running() if self._is_meant(self.whose(one))]
        if found:
            return found
        whose = f"group {self.group}" if self.group else f"user {self.user}"
        for_whom = f" for the {whose}" if self.group or self.user else ""
        raise SpecError(
            attempt=f"{self.act} what runs{for_whom}",
            answer="nothing that you have started runs" + (" for them" if for_whom else ""),
            remedy="See what runs, and for whom: jupyter sandbox list",
        )

    def whose(self, sandbox: Sandbox) -> str:
        """For whom it runs."""
        return sandbox.record.person or sandbox.record.user

    def _is_meant(self, name: str) -> bool:
        if not self.group:
            return name == self.user or not self.user
        with contextlib.suppress(HostError):
            return self.group in Person.find(name).groups
        return False

    def each(self, found: Iterable[Sandbox], act: Callable[[Sandbox], str]) -> None:
        """*act* on each of *found*, and print what it says; one that fails keeps no other from it.
        Raises the first error."""
        errors: list[SandboxError] = []
        for sandbox in found:
            try:
                print(f"Kernel {short_id(sandbox.record)}: {one_line(act(sandbox))}.")
            except SandboxError as error:
                errors.append(error)
        self.raise_first(errors)

    def raise_first(self, errors: Sequence[SandboxError]) -> None:
        """And print the others."""
        for other in errors[1:]:
            print(one_line(str(other)))
        if errors:
            raise errors[0]


def _tree(sandbox: Sandbox) -> CgroupTree:
    return open_existing(cgroup_facts(sandbox.record), sandbox.record.tree)


class LimitsApp(OnKernels):
    """Gives kernels that run other limits."""

    name = "jupyter sandbox limits"
    usage = (
        "jupyter sandbox limits KERNEL|--user NAME|--group NAME mem=4G cpu=2 pids=100 network=none"
    )
    description = (
        "Change the limits of kernels while they run, as with mem=4G cpu=2 pids=100 network=none: "
        "more or less memory, CPU or processes, or no network any more. It holds at once and until "
        "the kernel ends or is restarted; what later kernels have is for their options and for the "
        "policy to say. Less memory than is in use is refused: nobody is ended for it. Root "
        "changes what servers of root's, a spawner or a broker have started, everybody else their "
        "own kernels, within what the policy lets them have."
    )
    examples = """
    jupyter sandbox limits 134530eb mem=4G
    jupyter sandbox limits --group students network=none
    """
    act = "change limits of"

    def start(self) -> None:
        """Called once by `main`."""
        words = [word for word in self.extra_args if "=" not in word]
        wishes = self._wishes([word for word in self.extra_args if "=" in word])
        self.each(self.meant(words), lambda sandbox: change(sandbox, wishes))

    def _wishes(self, pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
        """By options, what they come to; SpecError."""
        found = {}
        for pair in pairs:
            name, _, value = pair.partition("=")
            option = _CAPS.get(name, name)
            if option not in {*_CAPS.values(), _NETWORK} or (
                option == _NETWORK and value != Network.NONE
            ):
                raise SpecError(
                    attempt=f"change {pair!r}",
                    answer="that cannot be changed while a kernel runs",
                    remedy=f"What can is {_WORDS}; for all else start it anew.",
                )
            found[option] = parse(Kind.FORCED, option, _typed(value))
        if not found:
            raise self.wrong(f"write what to change: {_WORDS}")
        return found


def _typed(text: str) -> int | float | str:
    """A number, where it is one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def change(sandbox: Sandbox, wishes: Mapping[str, Mapping[str, Any]]) -> str:
    """Let *sandbox* have what *wishes* say, by options and fields; a sentence that says so."""
    wishes = _within_policy(wishes)
    folder = RecordFolder(sandbox.folder)
    fields = {path: value for of_option in wishes.values() for path, value in of_option.items()}
    limits = {
        path.removeprefix("limits."): value
        for path, value in fields.items()
        if path.startswith("limits.")
    }
    if limits:
        _tree(sandbox).change(Limits(**limits))
    if _NETWORK in wishes:
        _cut_off(sandbox.record)
    told = ", ".join(f"{option} = {described(values)}" for option, values in wishes.items())
    with contextlib.suppress(OSError, ValueError):  # it ends just now
        folder.change(lambda record: _with(record, limits, fields, told))
    audit.changed(sandbox.record, told)
    untold = _UNTOLD if "memory_bytes" in limits and not _is_heard(sandbox, folder) else ""
    return f"has {told} now{untold}"


def _is_heard(sandbox: Sandbox, folder: RecordFolder) -> bool:
    """Whether somebody tells PID 1, which interrupts a kernel before its cap, that it has another:
    the server that started it, which looks every three seconds."""
    record = sandbox.record
    if not record.memory_limit_bytes:
        return True  # it has none
    is_orphan = folder.own_if_orphan()
    folder.release()
    return not is_orphan and not record.unheard


def _with(
    record: Record, limits: Mapping[str, Any], fields: Mapping[str, Any], told: str
) -> Record:
    return replace(
        record,
        memory_limit_bytes=limits.get("memory_bytes", record.memory_limit_bytes),
        cpu_cores=limits.get("cpu_cores", record.cpu_cores),
        network=str(fields.get("network.mode", record.network)),
        changed="; ".join(filter(None, (record.changed, told))),
    )


def _within_policy(wishes: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    """What root changes is an administrator's word; everybody else has no more than at a start."""
    terms = None if os.geteuid() == 0 else terms_of_this_process()
    if terms is None:
        return wishes
    values = {path: value for of_option in wishes.values() for path, value in of_option.items()}
    limits = {p.removeprefix("limits."): v for p, v in values.items() if p.startswith("limits.")}
    wish = SandboxSpec(workdir="/", limits=Limits(**limits))
    allowed, notices = narrow(wish, terms)
    for notice in notices:
        print(one_line(notice))
    kept = allowed.limits
    return {
        option: {
            path: getattr(kept, path.removeprefix("limits.")) if path.startswith("limits.") else v
            for path, v in of_option.items()
        }
        for option, of_option in wishes.items()
    }


def _cut_off(record: Record) -> None:
    """Take its network away; HostError."""
    attempt = f"take the network of kernel {short_id(record)} away"
    if record.network == Network.NONE:
        return
    if os.geteuid() != 0:
        raise HostError(
            attempt=attempt,
            answer="only root can enter a network that runs",
            remedy='Set network = "none" in its kernel.json, and restart it.',
        )
    pidfd = open_init(record)
    if pidfd is None:
        raise HostError(attempt=attempt, answer="it has ended", remedy="There is none any more.")
    try:
        # While we have its pidfd, no other process gets its number.
        cut_off(record.init_pid)
    except OSError as error:
        answer = error.strerror or str(error)
        raise HostError(attempt=attempt, answer=answer, remedy="End the kernel.") from error
    finally:
        os.close(pidfd)


class FreezeApp(OnKernels):
    """Stops kernels, as they are."""

    name = "jupyter sandbox freeze"
    usage = "jupyter sandbox freeze KERNEL|--user NAME|--group NAME"
    description = (
        'Stop every process of kernels ("pens down"): they keep their memory, and go on where they '
        "were with thaw. A kernel that is stopped can be ended as any other, and restarted; it "
        "answers nothing until then. What is started meanwhile runs."
    )
    examples = """
    jupyter sandbox freeze --group students
    jupyter sandbox freeze 134530eb
    """
    act = "freeze"

    def start(self) -> None:
        """Called once by `main`."""
        self.each(self.meant(self.extra_args), _freeze)


class ThawApp(OnKernels):
    """Lets kernels go on that were stopped."""

    name = "jupyter sandbox thaw"
    usage = "jupyter sandbox thaw KERNEL|--user NAME|--group NAME"
    description = "Let kernels go on that jupyter sandbox freeze has stopped."
    examples = """
    jupyter sandbox thaw --group students
    """
    act = "thaw"

    def start(self) -> None:
        """Called once by `main`."""
        self.each(self.meant(self.extra_args), _thaw)


def _freeze(sandbox: Sandbox) -> str:
    _tree(sandbox).freeze()
    audit.changed(sandbox.record, "frozen")
    return "is frozen"


def _thaw(sandbox: Sandbox) -> str:
    _tree(sandbox).thaw()
    audit.changed(sandbox.record, "thawed")
    return "goes on"
