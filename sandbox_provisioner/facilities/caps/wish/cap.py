"""cap.py - any process outside; pure: what every cap is made of.

A cap is one file of this folder. It has three parts: the options that users write (traits), the
wish that these come to (fields of `spec.Limits`, with units in their names), and the `Cap` itself,
with its words for people and what it writes where. The drivers in `cgroup/` write for every cap in
`CAPS`, and know none of them by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from traitlets import All, HasTraits, observe

# A property of a unit of systemd, with its type of D-Bus.
Property = tuple[str, tuple[str, Any]]


def same_text(written: str, back: str) -> bool:
    """Whether a file tells exactly what was written to it."""
    return written == back


@dataclass(frozen=True, slots=True)
class Write:
    """*text* for a *file* of the sandbox's group.

    An *optional* file may be absent, because Linux can be built without it. Where the file *unless*
    is there, this one is left alone. *shared* is the text for a group of many sandboxes, None for
    the same, "" for none.
    *same* compares what was written with what the file reads afterwards, for files that answer in
    another notation.
    """

    file: str
    text: str
    optional: bool = False
    unless: str = ""
    shared: str | None = None
    same: Callable[[str, str], bool] = same_text


class Options(HasTraits):
    """Options of the provisioner that belong to one cap.

    *untouched* holds the names of those whose default was taken: nobody has asked for it. It is
    filled by `usual`, which an option's ``@default`` calls.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.untouched: set[str] = set()
        super().__init__(*args, **kwargs)

    def usual(self, name: str) -> Any:
        """The default of the option *name*, noted down as taken."""
        self.untouched.add(name)
        return getattr(type(self), name).default_value

    @observe(All)
    def _is_asked_for(self, change: Any) -> None:
        self.untouched.discard(change.name)


class Cap(ABC):
    """One thing in which a sandbox can be capped.

    *facility* is its name, for `on_missing` and for doctor, *controller* what of Linux enforces it,
    by the name of cgroup v2, and *v1_controller* by that of v1. *options* are the names of those
    that ask for it, and *fields* those of `spec.Limits`. *noun* completes "nothing but the machine
    limits a kernel's ...", and *otherwise* "Kernels that set OPTION do not start" where a cap
    cannot be had. *needs* are files, by the version of cgroups, that not every Linux with the
    controller has.
    """

    facility: ClassVar[str]
    controller: ClassVar[str]
    v1_controller: ClassVar[str] = ""
    options: ClassVar[tuple[str, ...]]
    fields: ClassVar[tuple[str, ...]]
    noun: ClassVar[str]
    otherwise: ClassVar[str] = ""
    needs: ClassVar[Mapping[int, str]] = MappingProxyType({})
    #: Whether what it writes names the *disk* of the work directory.
    needs_disk: ClassVar[bool] = False
    #: What a person can do where `why_not` tells something, or what it `needs` is missing.
    remedy: ClassVar[tuple[str, ...]] = ()
    #: The file, by the version of cgroups, in which a group above ours tells what it has.
    above: ClassVar[Mapping[int, str]] = MappingProxyType({})

    #: The file of a group that tells what it uses, where a cap that is less ends somebody.
    use: ClassVar[str] = ""

    @abstractmethod
    def wish(self, options: Any) -> Any:
        """The fields of `spec.Limits` that *options* come to; SpecError."""

    @abstractmethod
    def check(self, limits: Any) -> None:
        """Refuse values that cannot be meant; SpecError."""

    @abstractmethod
    def describe(self, limits: Any) -> str:
        """The wish in the words of an error: "cap memory at 512 MiB"."""

    @abstractmethod
    def v1(self, limits: Any, disk: str) -> Iterator[Write]:
        """What cgroup v1 needs, in order; nothing where nothing is asked for. *disk* is the one of
        the work directory, "MAJOR:MINOR"."""

    @abstractmethod
    def v2(self, limits: Any, disk: str) -> Iterator[Write]:
        """The same for cgroup v2."""

    @abstractmethod
    def properties(self, limits: Any, disk: str) -> Iterator[Property]:
        """The same for a scope of systemd: systemd.resource-control(5)."""

    def why_not(self, disk: str) -> str:
        """Why it cannot be had on this *disk*; "" where it can."""
        return ""

    def beyond(self, limits: Any, above: str) -> tuple[str, str] | None:
        """Answer and remedy where *limits* are more than a group above has, whose file says
        *above*."""
        return None

    def below_use(self, limits: Any, told: Mapping[str, int]) -> str:
        """Why a group whose file `use` has *told* so much cannot have *limits* from now on; "" if
        it can."""
        return ""

    def eases_memory(self, limits: Any) -> bool:
        """Whether a kernel goes on beyond its cap on memory: then nobody interrupts it before,
        unless that was asked for."""
        return False

    def is_asked(self, limits: Any) -> bool:
        """Whether *limits* have this cap."""
        return any(getattr(limits, name) is not None for name in self.fields)
