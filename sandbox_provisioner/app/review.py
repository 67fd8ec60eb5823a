"""app/review.py - commands of their own: `jupyter sandbox diff`, `keep` and `discard`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from traitlets import Bool

from sandbox_provisioner.app.command import (
    COMMON_ALIASES,
    COMMON_FLAGS,
    OPTION_ALIASES,
    SandboxCommand,
    spoken,
)
from sandbox_provisioner.app.tables import table
from sandbox_provisioner.broker.kept_through import reviews_through
from sandbox_provisioner.errors import HostError, SandboxError, SpecError
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.layers.changes import Change, What, set_down
from sandbox_provisioner.layers.folders import About, folders_of
from sandbox_provisioner.layers.keep import Keeping, Outcome
from sandbox_provisioner.layers.place import all_bases, layer_path
from sandbox_provisioner.layers.review import Folder, reviewed
from sandbox_provisioner.records import UNREADABLE
from sandbox_provisioner.spec import relative
from sandbox_provisioner.units import format_bytes

_MOST_SHOWN = 500
_MARKS = {What.ADDED: "+", What.CHANGED: "~", What.REMOVED: "-", What.MODE: "m"}
_ALIASES = {**COMMON_ALIASES, "layer-dir": OPTION_ALIASES["layer-dir"]}
_DIFF_FLAGS = {**COMMON_FLAGS, "json": ({"DiffApp": {"json_output": True}}, "Print JSON.")}
_KEEP_FLAGS = {
    **COMMON_FLAGS,
    "overwrite": ({"KeepApp": {"overwrite": True}}, "Also what somebody else has changed."),
}
_MARKS_MEAN = (
    "Lines begin with + for what is new, ~ for what has changed, - for what is gone, m for what "
    "has another mode; then ! where somebody else has changed the same meanwhile, and x for "
    "what is never kept."
)
_WHICH = (
    "KERNEL is its id, or the beginning of it, or its notebook, as jupyter sandbox diff lists them."
)
Found = tuple[Folder, About]


class _ReviewCommand(SandboxCommand):
    """What the three have in common."""

    aliases = _ALIASES

    def all(self) -> list[Found]:
        """All that this user can decide about: root about everybody's, others about their own, and
        what a broker has for them."""
        options = self.provisioner()
        bases = all_bases(layer_path(options.layer_dir))
        found: list[Found] = [one for base in bases for one in folders_of(base)]
        path = options.broker_socket
        if os.geteuid() and os.path.exists(path):
            try:
                found += reviews_through(path)
            except SandboxError as error:
                print(spoken(str(error)), file=sys.stderr)
        return sorted(found, key=lambda one: one[1].since_ns)

    def found(self) -> Found:
        """The one that the first word means; SpecError, HostError."""
        folder, _ = find(self.extra_args[0], self.all())
        try:
            return folder, folder.read()
        except UNREADABLE as error:
            raise HostError(
                attempt=f"read about the changes of kernel {one_line(self.extra_args[0])}",
                answer=str(error),
                remedy="Look which there are: jupyter sandbox diff",
            ) from None

    def taken(self) -> Found:
        """The same, locked: nobody else writes there, or decides; HostError if somebody does."""
        folder, about = self.found()
        if not folder.take():
            raise HostError(
                attempt=f"decide about the changes of kernel {about.short_id}",
                answer="it runs, or another command decides at this moment",
                remedy="Shut it down first. What it has changed so far: "
                f"jupyter sandbox diff {about.short_id}",
            )
        return folder, about


class DiffApp(_ReviewCommand):
    """Shows what one kernel has changed, or which kernels' changes wait."""

    usage = "jupyter sandbox diff [KERNEL] [--json]"
    description = (
        'Show what a kernel with workdir_mode = "review" has changed in its work directory, also '
        "while it runs; without KERNEL, whose changes wait for a decision. " + _MARKS_MEAN + " "
        + _WHICH
    )  # fmt: skip
    examples = """
    jupyter sandbox run --workdir-mode review -- make
    jupyter sandbox diff
    jupyter sandbox diff 134530eb
    jupyter sandbox diff analysis.ipynb --json | jq -r '.changes[].path'
    """
    json_output = Bool(False, help="Print JSON: the fields stand in docs/review.md.").tag(
        config=True
    )
    flags = _DIFF_FLAGS

    def start(self) -> None:
        """Called once by `main`; SpecError where there is no such kernel."""
        if len(self.extra_args) > 1:
            raise self.wrong("write the id of one kernel, or none")
        if not self.extra_args:
            found = self.all()
            print(json.dumps([_listed(*one) for one in found], indent=1) if self.json_output
                  else _list_of(found))  # fmt: skip
            return
        folder, about = self.found()
        with reviewed(folder, about) as review:
            if self.json_output:
                for text in in_json(folder, about, review.walk.changes()):
                    print(text, end="")
                print()
            else:
                print(as_text(folder, about, review.walk.changes()))


class KeepApp(_ReviewCommand):
    """Writes what a kernel has changed into its work directory."""

    usage = "jupyter sandbox keep KERNEL [PATH ...] [--overwrite]"
    description = (
        "Write what a kernel has changed into its work directory, all of it or what lies at PATHs "
        "relative to that, when the kernel has ended. What somebody else has changed meanwhile is "
        "left alone, and told; so is what a kernel may never write, such as a hook of git's, or "
        "set-id programs, devices and sockets. What is kept is forgotten; what is left waits on, "
        "and the exit status is 1 then. It may be stopped at any time, and started again. " + _WHICH
    )
    examples = """
    jupyter sandbox keep 134530eb
    jupyter sandbox keep 134530eb report.html figures
    jupyter sandbox keep 134530eb --overwrite
    """
    overwrite = Bool(False, help="Also in place of what somebody else has changed meanwhile.").tag(
        config=True
    )
    flags = _KEEP_FLAGS

    def start(self) -> None:
        """Called once by `main`; SystemExit with 1 where something is left."""
        if not self.extra_args:
            raise self.wrong("write the id of one kernel")
        folder, about = self.taken()
        try:
            outcome = keep(folder, about, self.extra_args[1:], overwrite=self.overwrite)
        finally:
            folder.forget()
        for change, why in outcome.left[:_MOST_SHOWN]:
            print(f"Not kept: {one_line(change.path)}: {one_line(why)}.")
        if (more := len(outcome.left) + outcome.more_left - _MOST_SHOWN) > 0:
            print(f"Not kept: {more} more.")
        print(f"Kept {_counted(outcome.kept)} of kernel {about.short_id} in "
              f"{one_line(about.workdir)}.")  # fmt: skip
        if outcome.left:
            print(f"To be rid of the rest: jupyter sandbox discard {about.short_id}")
            raise SystemExit(1)


class DiscardApp(_ReviewCommand):
    """Throws away what a kernel has changed."""

    usage = "jupyter sandbox discard KERNEL"
    description = (
        "Throw away what a kernel has changed in its work directory, when it has ended. The "
        "directory itself is as it was. " + _WHICH
    )
    examples = """
    jupyter sandbox discard 134530eb
    """

    def start(self) -> None:
        """Called once by `main`."""
        if len(self.extra_args) != 1:
            raise self.wrong("write the id of one kernel")
        folder, about = self.taken()
        try:
            folder.discard()
        finally:
            folder.forget()
        print(f"Discarded what kernel {about.short_id} had changed in {one_line(about.workdir)}.")


def keep(folder: Folder, about: About, paths: Sequence[str], *, overwrite: bool = False) -> Outcome:
    """Keep what lies at *paths*, all of it where there are none. *folder*, which is ours, is
    removed if nothing is left."""
    names = [path.strip("/") for path in paths]

    def is_at(change: Change, name: str) -> bool:
        return relative(f"/{change.path}", f"/{name}") is not None

    def is_wanted(change: Change) -> bool:
        return not names or any(is_at(change, name) or is_needed(change, name) for name in names)

    def is_needed(change: Change, name: str) -> bool:
        """A new directory around it, or what that has taken the place of."""
        is_directory = change.kind == "directory"
        fits = change.what is (What.ADDED if is_directory else What.REMOVED)
        return fits and name.startswith(f"{change.path}/")

    # All that is there is looked at before anything is written: that changes files, too.
    with (
        reviewed(folder, about) as review,
        set_down((walk := review.walk).changes()) as changes,
    ):
        for name in names:
            if not any(is_at(change, name) for change in changes()):
                raise _no_change(about, name)
        owner = about.owner_uid, about.owner_gid
        keeping = Keeping(
            review.upper, review.real, owner, about.sandbox_id, about.since_ns,
            overwrite=overwrite,
        )  # fmt: skip
        stuck = keeping.clear(walk.unfinished)
        outcome = keeping.keep(changes(), is_wanted)
        outcome.left += stuck
        is_done = not stuck and next(review.walk.changes(), None) is None
    if is_done:
        folder.settle()
    return outcome


def _no_change(about: About, name: str) -> SpecError:
    return SpecError(
        attempt=f"keep {one_line(name)!r} of kernel {about.short_id}",
        answer="the kernel has changed nothing there",
        remedy=f"See what it has changed: jupyter sandbox diff {about.short_id}",
    )


def find(word: str, found: Sequence[Found]) -> Found:
    """The one of *found* that *word* means; SpecError."""
    meant = [one for one in found if _is_meant(word, one[1])]
    if len(meant) == 1:
        return meant[0]
    known = ", ".join(about.short_id for _, about in meant or found) or "none"
    raise SpecError(
        attempt=f"find the changes of kernel {one_line(word)!r}",
        answer=f"it may be one of {len(meant)}" if meant else "no such kernel has left any",
        remedy=f"Write one of these ids: {known}.",
    )


def _is_meant(word: str, about: About) -> bool:
    ids = (about.kernel_id, about.sandbox_id)
    named = word in {about.notebook, os.path.basename(about.notebook)} - {""}
    return named or any(one.startswith(word) for one in ids if word)


# -- what is shown


def _listed(folder: Folder, about: About) -> dict[str, Any]:
    return {
        "sandbox_id": about.sandbox_id,
        "kernel_id": about.kernel_id,
        "name": about.name,
        "notebook": about.notebook,
        "workdir": about.workdir,
        "running": folder.is_running,
        "upper": folder.told,
    }


def as_json(change: Change) -> dict[str, Any]:
    """For programs."""
    return {
        "path": change.path,
        "what": change.what.value,
        "kind": change.kind,
        "size_bytes": change.size_bytes,
        "mode": f"{change.mode:04o}",
        "link": change.text,
        "conflict": change.conflict,
        "refusal": change.refusal,
        "note": change.note,
    }


def in_json(folder: Folder, about: About, changes: Iterable[Change]) -> Iterator[str]:
    """The parts of a text in JSON: a kernel may have left a million changes."""
    head = json.dumps({**_listed(folder, about), "changes": []}, indent=1)
    yield head.removesuffix("]\n}")
    before = "\n"
    for change in changes:
        text = json.dumps(as_json(change), indent=1)
        yield before + "\n".join(f"  {line}" for line in text.splitlines())
        before = ",\n"
    yield "]\n}" if before == "\n" else "\n ]\n}"


def _list_of(found: Iterable[Found]) -> str:
    rows = [
        (about.short_id, about.notebook or about.name, about.workdir, _state(folder))
        for folder, about in found
    ]
    if not rows:
        return "No kernel's changes wait for a decision."
    return table([("kernel", "notebook or name", "work directory", "state"), *rows])


def _state(folder: Folder) -> str:
    if folder.is_running:
        return "running"
    hours = (time.time() - folder.ended) / 3600
    return f"ended {hours / 24:.0f} days ago" if hours >= 48 else f"ended {hours:.1f} hours ago"


def as_text(folder: Folder, about: About, changes: Iterable[Change]) -> str:
    """For people."""
    shown, count = [], 0
    for change in changes:
        count += 1
        if count <= _MOST_SHOWN:
            shown.append(_line(change))
    lines = [
        f"Kernel {about.short_id} in {one_line(about.workdir)} ({_state(folder)}): "
        f"{_counted(count)}."
    ]
    if shown:
        lines += ["", *shown]
    if (more := count - _MOST_SHOWN) > 0:
        lines.append(f"… and {more} more: --json shows all")
    if shown and not folder.is_running:
        lines += [
            "",
            f"To have them:        jupyter sandbox keep {about.short_id}",
            f"To throw them away:  jupyter sandbox discard {about.short_id}",
        ]
    return "\n".join(lines)


def _line(change: Change) -> str:
    second = "x" if change.refusal else "!" if change.conflict else " "
    path = one_line(change.path or ".") + ("/" if change.kind == "directory" else "")
    tell: Callable[[Change], str] = _TOLD.get(change.kind, lambda one: one.kind)
    about = "" if change.what is What.REMOVED else tell(change)
    if change.what is What.MODE:
        about = f"mode {change.old_mode:o} → {change.mode:o}"
    told = filter(None, (about, change.note, change.refusal or change.conflict))
    return f"{_MARKS[change.what]}{second} {path}  {one_line('; '.join(told))}".rstrip()


_TOLD: dict[str, Callable[[Change], str]] = {
    "file": lambda one: format_bytes(one.size_bytes),
    "link": lambda one: f"-> {one.text}",
    "directory": lambda one: "",
}


def _counted(number: int) -> str:
    return f"{number} change{'' if number == 1 else 's'}"
