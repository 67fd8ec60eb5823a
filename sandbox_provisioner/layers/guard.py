"""layers/guard.py - pure: what of a kernel's changes may be kept.

The same as of a work directory that it writes to directly: nothing at the places that were closed
to it, or are by now. And more, since here it is known what is new: in no repository, however deep
and whoever has made it, what leads git to programs. Nor the other way about: where that is already,
as an earlier kernel's that was no repository's then, nothing that makes it one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from sandbox_provisioner.spec import WRITTEN_THROUGH, Covers

# What `keep` calls what it has not yet finished, or not yet removed, beside where it goes.
UNFINISHED = ".sandbox-keep-"
_GIT = ".git"
# Whoever has these can be what git keeps of a repository, with the rest of it elsewhere, or made
# later: gitrepository-layout(5), "commondir".
_OF_REPOSITORIES = ({"objects", "refs"}, {"HEAD", "commondir"})
_PARTS = frozenset().union(*_OF_REPOSITORIES)


class Guard:
    """*closed* are paths, relative to the work directory."""

    def __init__(self, closed: Iterable[str], covers: Covers) -> None:
        self.closed = frozenset(path.strip("/") for path in closed) - {"", "."}
        self._around = frozenset(
            path[:position] for path in self.closed for position in _slashes(path)
        )
        self._texts = {b"", *(text.encode() for _, text in covers.repository_placed)}
        self._of_git = () if covers.whole else _of_git(covers)
        self._leading = frozenset(_split(path)[0] for path in self._of_git)

    def is_closed(self, path: str) -> bool:
        """Whether the kernel was not given *path*."""
        return path in self.closed or any(path[:end] in self.closed for end in _slashes(path))

    def is_around(self, path: str) -> bool:
        """Whether a closed place lies in *path*: who removes it removes that as well."""
        return path in self._around

    def is_stand_in(self, link: str | None, text: bytes | None) -> bool:
        """Whether a closed place holds no more than what PID 1 puts there before a kernel runs: a
        link to *link*, or a file with *text*."""
        if link is not None:
            return link.startswith(f"{WRITTEN_THROUGH}/")
        return text in self._texts

    def refusal(self, path: str, *, is_directory: bool, in_bare: Sequence[str]) -> str:
        """Why what stands at *path* must not be kept, "" if it may. *in_bare* are the paths of
        all directories around it which may be repositories without a work tree."""
        if self.is_closed(path):
            return "the host would run or trust it"
        names = path.split("/")
        if any(name.startswith(UNFINISHED) for name in names):
            return "keep has such names for itself"
        if not self._of_git:
            return ""
        if names[-1] == _GIT and not is_directory:
            return "it leads git to another place"
        if self._leads_git(names, in_bare):
            return "git would run what it says"
        return ""

    def makes_repository(self, name: str, real: Collection[str]) -> bool:
        """Whether a new *name* makes a repository of a directory with *real* names in it, some of
        which lead git to programs."""
        return name in _PARTS and name not in real and not self._leading.isdisjoint(real)

    def _leads_git(self, names: list[str], in_bare: Sequence[str]) -> bool:
        if any(self._is_one(names[len(_split(path)) if path else 0 :]) for path in in_bare):
            return True
        if names[-1:] == [".gitmodules"] and ".gitmodules" in self._of_git:
            return True
        return any(
            name == _GIT and self._is_one(names[place + 1 :]) for place, name in enumerate(names)
        )

    def _is_one(self, inside: list[str]) -> bool:
        """Whether *inside*, as seen from what git keeps of a repository, is one of the places."""
        return any(inside[: len(one)] == one for one in map(_split, self._of_git))


def is_repository(names: Collection[str]) -> bool:
    """Whether git may take a directory with these *names* for one, or for a part of one."""
    return any(set(names) >= one for one in _OF_REPOSITORIES)


def _of_git(covers: Covers) -> tuple[str, ...]:
    placed = (path for path, _ in covers.repository_placed)
    paths = (*covers.repository_directories, *covers.repository_frozen, *placed)
    return tuple(path.removeprefix(f"{_GIT}/") for path in paths)


def _split(path: str) -> list[str]:
    return path.split("/")


def _slashes(path: str) -> list[int]:
    return [position for position, letter in enumerate(path) if letter == "/"]
