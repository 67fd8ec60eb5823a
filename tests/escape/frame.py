"""frame.py - anywhere: the table of attempts, which the rooms of this folder fill.

An attempt is a function with a number and a sentence. ``@attempt`` makes one that runs *inside*, in
a kernel, by a message; ``@between`` one that runs on the host and plays what a kernel left behind,
a start or two, and who comes after it. Its answer is its value as text, or the name of its error;
``after`` looks on the host when it is over, and what that sees is the answer then.

A **control** is the same function without a box, on the same objects of the test's own; it has to
succeed. What nobody can do here, or nobody should, has a reason in its place.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sandbox_provisioner.inside.kernel_calls import landlock_version

# The version of Landlock that keeps signals back (landlock(7): LANDLOCK_SCOPE_SIGNAL).
SCOPED_SIGNALS = 6


class Kind(StrEnum):
    """What a class of attacks has in common."""

    FILES = "files of the host"
    DESCRIPTORS = "inherited descriptors"
    PRIVILEGES = "privileges"
    PROCESSES = "other processes"
    NAMESPACES = "namespaces"
    MOUNTS = "mounts"
    CALLS = "calls of the Linux kernel"
    REACHING = "allowed calls whose commands reach others"
    MACHINE = "the machine"
    TERMINALS = "terminals"
    NETWORK = "networks"
    SOCKETS = "sockets and IPC"
    PROC = "/proc and small leaks"
    LIMITS = "limits"
    FLOODS = "floods of what is read outside"
    PATHS = "paths swapped between two looks"
    TRUSTED = "what the trusted side runs"
    HOMES = "homes"
    REPOSITORIES = "repositories"
    REVIEWED = "what is reviewed before it is kept"
    ROOTS = "other root file systems"
    LAYERS = "what is kept of what kernels install"
    CONTENTS = "the contents manager beside us"
    CLEANING = "what is cleaned up"


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to have a kernel. *group* is a set of variants that mostly answer alike."""

    name: str
    group: str
    options: Mapping[str, Any]


VARIANTS = (
    Variant("root", "root", {}),
    Variant("nursery", "root", {"warm": True}),
    Variant("spare", "root", {"warm": True, "spares": 1}),
    Variant("user", "user", {}),
    Variant("user-nursery", "user", {"warm": True}),
    Variant("user-spare", "user", {"warm": True, "spares": 1}),
    Variant("landlock", "landlock", {"confinement": "landlock"}),
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Attempt:
    """A row of the table. *answers* are by the names of variants and of groups, "" is for all; None
    means that it is not tried there. *inside* tells who runs it: a kernel, or the host."""

    number: int
    title: str
    kind: Kind
    stands_for: str
    act: Callable[..., Any]
    arguments: tuple[Any, ...]
    answers: Mapping[str, str | None]
    control: str
    why_no_control: str
    present: bool
    without: Callable[..., Any] | None
    after: Callable[..., Any] | None
    inside: bool
    alone: bool
    options: Mapping[str, Any]
    needs: Sequence[str]
    unscoped: str

    def answer(self, variant: Variant) -> str | None:
        """What it has to answer there; None if it is not tried."""
        if self.unscoped and variant.group == "landlock" and landlock_version() < SCOPED_SIGNALS:
            return self.unscoped
        for name in (variant.name, variant.group, ""):
            if name in self.answers:
                return self.answers[name]
        return None

    def allowed(self, variant: Variant) -> list[str]:
        """The same, each way to put it."""
        return (self.answer(variant) or "").split("|")

    @property
    def source(self) -> str:
        """The function as text, without its decorators."""
        return source_of(self.act)


def source_of(function: Callable[..., Any]) -> str:
    """*function* as text, without its decorators."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    node = tree.body[0]
    assert isinstance(node, ast.FunctionDef)
    node.decorator_list.clear()
    return ast.unparse(node)


table: dict[int, Attempt] = {}


def attempt(
    number: int,
    title: str,
    kind: Kind,
    stands_for: str,
    *arguments: Any,
    expect: str | None,
    control: str = "",
    no_control: str = "",
    present: bool = True,
    without: Callable[..., Any] | None = None,
    after: Callable[..., Any] | None = None,
    inside: bool = True,
    alone: bool = False,
    options: Mapping[str, Any] | None = None,
    needs: Sequence[str] = (),
    unscoped: str = "",
    **answers: str | None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put a function into the table; it gets the `Host`, and *arguments*.

    *expect* is the answer in all variants but for *answers*; "A|B" is either. *control* is what it
    answers without a box, where *without* may stand in for the function; *no_control* is why it has
    none, and *present* whether this machine has what is attacked. Its kernel has *options*, and is
    shared by those that have the same; *alone* means that it is nobody else's. *needs* are
    facilities, as of the mark "requires". *unscoped* is the answer under a Landlock that does not
    judge signals yet: see SECURITY.md.
    """

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        if alone:  # a nursery for each would take seconds
            answers.update({v.name: None for v in VARIANTS if v.options.get("warm")})
        assert number not in table, f"{number} is {table[number].title!r} already"
        assert bool(control) != bool(no_control), f"{number} has no control, or two"
        table[number] = Attempt(
            number=number, title=title, kind=kind, stands_for=stands_for, act=function,
            arguments=arguments, answers={"": expect, **answers}, control=control,
            why_no_control=no_control, present=present, without=without, after=after,
            inside=inside, alone=alone, options=options or {}, needs=needs,
            unscoped=unscoped,
        )  # fmt: skip
        return function

    return note


def between(
    *words: Any, variants: Sequence[str] = ("root", "user", "landlock"), **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An `attempt` that runs on the host, before and between starts; it gets a `Stage`.

    It is tried in *variants*: each has kernels of its own, which a nursery makes no other.
    """
    elsewhere = {group: None for group in ("root", "user", "landlock") if group not in variants}
    return attempt(*words, inside=False, alone=True, **elsewhere, **options)
