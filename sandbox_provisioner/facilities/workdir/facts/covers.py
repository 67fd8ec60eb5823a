"""covers.py - reads only: what of a work directory the host would run or trust later.

`find_covered` is called for each start, by whoever launches, and turns the names of `Covers` into
paths below the work directory. What becomes of them is decided in `facilities/workdir/plan.py`.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.workdir.facts.git_settings import named_by_settings
from sandbox_provisioner.facilities.workdir.facts.login_files import named_at_login
from sandbox_provisioner.links import real_path
from sandbox_provisioner.places import Folders, Place
from sandbox_provisioner.python_files import read_start
from sandbox_provisioner.spec import Covers, relative

# Repositories are looked for so deep below the work directory.
_REPOSITORY_DEPTH = 2
# Of what a server runs and is not there, what would surprise in its file browser.
_NOT_SHOWN = {"node_modules"}
_BARE = ("HEAD", "objects", "refs", "config")
# Each cover is a mount, and a kernel can make any number of names that have to be covered.
_MOST_COVERED = 1000
_MOST_PLACES = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Covered:
    """What `Covers` means in one work directory, as paths relative to it, with what symbolic links
    at these places lead to.

    The kernel gets an empty stand-in for each of *directories*, *files*, *links* and *sockets*, and
    finds what is there of *frozen* read-only. Missing *directories* are made; so are *links*, which
    are all missing, as symbolic links to nothing, which programs outside take for missing;
    *sockets*, whose names do not begin with a dot, as such, which file browsers do not show; and
    *placed*, the files and their texts. *repositories* are those that were there before the kernel.
    """

    directories: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    sockets: tuple[str, ...] = ()
    placed: tuple[tuple[str, str], ...] = ()
    frozen: tuple[str, ...] = ()
    repositories: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many places that are; 0 if the kernel may have the whole work directory as it is."""
        hidden = (self.directories, self.files, self.links, self.sockets)
        return sum(map(len, (*hidden, self.placed, self.frozen)))


@dataclass(slots=True)
class _Found:
    """The same while it is being found."""

    directories: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    placed: dict[str, str] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    repositories: tuple[str, ...] = ()

    def covered(self) -> Covered:
        """Without what lies in a directory that is covered as a whole."""
        hidden = {path for path in self.directories if not _lies_in(path, self.directories)}
        missing = _apart(self.missing - self.files, hidden)
        return Covered(
            directories=tuple(sorted(hidden)),
            files=_apart(self.files, hidden),
            links=tuple(path for path in missing if os.path.basename(path).startswith(".")),
            sockets=tuple(path for path in missing if not os.path.basename(path).startswith(".")),
            placed=tuple((path, self.placed[path]) for path in _apart(self.placed, hidden)),
            frozen=_apart({*self.frozen, *self.placed} - self.files, hidden),
            repositories=self.repositories,
        )


def _lies_in(path: str, folders: Collection[str]) -> bool:
    """Whether a directory above *path* is one of *folders*."""
    while path := os.path.dirname(path):
        if path in folders:
            return True
    return False


def _apart(paths: Iterable[str], hidden: set[str]) -> tuple[str, ...]:
    return tuple(sorted(p for p in paths if p not in hidden and not _lies_in(p, hidden)))


def find_covered(
    place: Place,
    covers: Covers,
    *,
    home: str,
    homes: Iterable[str],
    own_folders: Iterable[str],
    run_by_host: Iterable[str] = (),
) -> Covered:
    """Look at the work directory *place*; SpecError if it is itself such a place, or if a home in
    it cannot be listed, TooManyFolders if more lie in it than are looked at.

    *home* is the server's own home, *homes* are all that the machine knows of, *own_folders* the
    server's settings and data. Of *run_by_host* what is there becomes read-only, and what is not
    gets a stand-in.
    """
    source, opened = place.source, f"/proc/self/fd/{place.fd}"
    found = _Found(directories=_within(source, own_folders))
    if covers.whole:
        _add_run_by_host(source, opened, run_by_host, found)
        return found.covered()
    _refuse_in_repository(source)
    # Of all other homes only the server's own is looked at, since a link in it may lead here: there
    # can be very many, and each path costs a look.
    related = {home, *(other for other in homes if _is_related(other, source))}
    for real in map(real_path, related):
        inside = relative(real, source)
        if inside is None:
            _look_from_outside(real, source, opened, covers, found)
        else:
            _look_inside(source, opened, inside, covers, found)
    found.repositories = repositories(opened)
    for git in found.repositories:
        for one in _behind(source, opened, git, found):
            _look_at_repository(source, opened, one, covers, found)
    _add_run_by_host(source, opened, run_by_host, found)
    covered = found.covered()
    if covered.count > _MOST_PLACES:
        answer = f"more than {_MOST_PLACES} places in it would have to be covered"
        raise bad_workdir(source, answer)
    return covered


def _add_run_by_host(source: str, opened: str, places: Iterable[str], found: _Found) -> None:
    def by_descriptor(path: str) -> str:
        inside = relative(path, source)
        return os.path.join(opened, inside) if inside else path

    there = {path for path in places if _is_something(by_descriptor(path))}
    found.frozen |= {p for p in _within(source, there) if os.path.lexists(f"{opened}/{p}")}
    for path in _within(source, {*places} - there):
        if os.path.basename(path) in _NOT_SHOWN:
            found.missing.add(path)
        elif path not in found.missing and not _lies_in(path, found.missing):
            found.directories.add(path)


def _is_something(path: str) -> bool:
    """Whether there is anything that the host could run: not where another kernel's stand-in is."""
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISDIR(kind):
            return not stat.S_ISSOCK(kind)
        with os.scandir(path) as listing:
            return any(listing)
    except OSError:
        return False


def _is_related(home: str, source: str) -> bool:
    home = real_path(home)
    return relative(home, source) is not None or relative(source, home) is not None


def _look_inside(source: str, opened: str, home: str, covers: Covers, found: _Found) -> None:
    """*home*, relative to *source*, lies in the work directory: what begins with a dot is covered,
    and so is what programs look for and is not there. *opened* leads to *source*, also where
    somebody has renamed it."""
    there = _entries(source, os.path.join(opened, home))
    for name in there.keys() & {*covers.home_frozen}:
        if not there[name] and not _is_something(os.path.join(opened, home, name)):
            del there[name]  # another kernel's stand-in
    visible = set(covers.home_visible)
    dotted = {name for name in there if name.startswith(".")} - visible
    if len(dotted) > _MOST_COVERED:
        answer = f"more than {_MOST_COVERED} names in the home directory in it begin with a dot"
        raise bad_workdir(source, answer)
    named = {path.partition("/")[0] for path in covers.home_directories} - visible
    frozen = set(covers.home_frozen) - named
    hidden = (dotted | (set(covers.home_files) & there.keys())) - frozen
    folders = named | {name for name in hidden if there[name]}
    found.directories |= _below(home, folders)
    found.files |= _below(home, hidden - folders)
    found.missing |= _below(home, {*covers.home_files, *frozen} - there.keys() - folders)
    found.frozen |= _below(home, frozen & there.keys())
    for name in (hidden | frozen) & there.keys():
        _add_target(source, os.path.join(opened, home, name), found)
    _add_secrets(source, os.path.join(opened, home), covers, found)
    for path in named_at_login(os.path.join(source, home), os.path.join(opened, home)):
        if not path.startswith(".") and _can_be(path):
            inside = os.path.join(home, path)
            is_there = os.path.lexists(os.path.join(opened, inside))
            (found.frozen if is_there else found.missing).add(inside)


def _add_secrets(source: str, home: str, covers: Covers, found: _Found) -> None:
    """What is secret in the directories of programs that are shown of *home*, by its real path: a
    link may lead there by another name."""
    matches = (
        path
        for pattern in covers.home_secrets
        for path in glob.iglob(pattern, root_dir=home, include_hidden=True)
    )
    for count, path in enumerate(matches, 1):
        if count > _MOST_COVERED:
            answer = f"the programs of the home in it have more than {_MOST_COVERED} secrets"
            raise bad_workdir(source, answer)
        real = real_path(os.path.join(home, path))
        if inside := relative(real, source):
            (found.directories if os.path.isdir(real) else found.files).add(inside)


def _entries(source: str, home: str) -> dict[str, bool]:
    """The names in *home*, and whether each is a directory."""
    try:
        with os.scandir(home) as listing:
            return {entry.name: entry.is_dir(follow_symlinks=False) for entry in listing}
    except OSError as error:
        answer = f"the home directory in it cannot be listed: {error.strerror}"
        raise bad_workdir(source, answer) from None


def _below(folder: str, names: Iterable[str]) -> set[str]:
    return {os.path.join(folder, name) for name in names}


def _look_from_outside(home: str, source: str, opened: str, covers: Covers, found: _Found) -> None:
    """The work directory lies deeper in *home*, or elsewhere: what is not in *home* can neither
    lead into the work directory nor have it in it."""
    try:
        there = set(os.listdir(home))
    except OSError:  # nobody may list it
        there = {path.partition("/")[0] for path in (*covers.home_directories, *covers.home_files)}

    def inside(names: Iterable[str]) -> set[str]:
        return _within(source, (os.path.join(home, n) for n in names if n.split("/")[0] in there))

    found.directories |= inside(covers.home_directories)
    found.files |= inside(covers.home_files)
    outer = {path for path in covers.home_frozen if relative(source, f"{home}/{path}") is None}
    found.frozen |= {path for path in inside(outer) if os.path.lexists(f"{opened}/{path}")}
    for name in there:
        if name.startswith("."):
            _add_target(source, os.path.join(home, name), found)


def _add_target(source: str, path: str, found: _Found) -> None:
    """What *path* leads to in the work directory, if it is a link: the host follows it."""
    if not os.path.islink(path):
        return
    target = real_path(path)
    inside = relative(target, source)
    if inside and inside not in found.directories:
        (found.directories if os.path.isdir(target) else found.files).add(inside)


def _within(source: str, paths: Iterable[str]) -> set[str]:
    """Those of *paths* that lie in *source*, relative to it; and where symbolic links at these
    places lead to in it, since the host would read what a kernel writes there (or makes there, if a
    link leads to nothing yet). SpecError if *source* itself is such a place."""
    found: set[str] = set()
    known: dict[str, str] = {}
    for path in paths:
        if relative(source, path) is not None:
            answer = f"it lies in {path}, which holds secrets or is run by the host"
            raise bad_workdir(source, answer)
        for candidate in (path, _real(path, known)):
            inside = relative(candidate, source)
            if inside:
                found.add(inside)
    return found


def _real(path: str, known: dict[str, str]) -> str:
    """os.path.realpath, for many paths that share their directories: *known* has those."""
    if ".." in path.split("/"):
        return real_path(path)
    if path not in known:
        above, name = os.path.split(path)
        joined = os.path.join(_real(above, known), name) if name else above
        known[path] = real_path(joined) if os.path.islink(joined) else joined
    return known[path]


# -- repositories


def _refuse_in_repository(source: str) -> None:
    """A directory in what git keeps of a repository: its hooks, of which all would be the kernel's.
    The whole of it can be a work directory, since the hooks are covered there."""
    above = os.path.dirname(source)
    while above != "/":
        if os.path.basename(above) == ".git" or _is_bare(above):
            answer = f"it lies in {above}, which git keeps for itself, and runs programs from"
            raise bad_workdir(source, answer)
        above = os.path.dirname(above)


def _is_bare(path: str) -> bool:
    """Whether git would take *path* for a repository without its work tree."""
    return all(os.path.lexists(f"{path}/{name}") for name in _BARE)


def repositories(opened: str) -> tuple[str, ...]:
    """The repositories in the directory *opened*, itself one or near it, by what git keeps of each:
    a ".git" or, of one without a work tree, the directory itself (gitrepository-layout(5)). Raises
    TooManyFolders.

    A kernel of a home directory works above its owner's repositories.
    """
    found: list[str] = []
    folders = Folders()
    waiting = [("", 0)]
    while waiting:
        folder, depth = waiting.pop()
        path = os.path.join(opened, folder)
        if os.path.lexists(f"{path}/.git"):
            found.append(os.path.join(folder, ".git"))
        if _is_bare(path):
            found.append(folder or ".")
        if depth < _REPOSITORY_DEPTH:
            names = [entry.name for entry in folders.of(path) if _may_hold_one(entry)]
            waiting += [(os.path.join(folder, name), depth + 1) for name in names]
    return tuple(sorted(found))


def _may_hold_one(entry: os.DirEntry[str]) -> bool:
    return entry.name != ".git" and not entry.is_symlink()


def _behind(source: str, opened: str, git: str, found: _Found) -> list[str]:
    """The directories of *source* in which git keeps what belongs to *git*: that itself, or what a
    link or a file in its place names (gitrepository-layout(5)), and what is shared with it."""
    path = os.path.join(opened, git)
    target: str | None = git
    if os.path.islink(path):
        found.frozen.add(git)
        target = _inside(source, git)
    elif not os.path.isdir(path):
        found.frozen.add(git)
        named = _line(path).removeprefix("gitdir:").strip()
        target = _inside(source, os.path.dirname(git), named) if named else None
    if target and not os.path.isdir(os.path.join(opened, target)):
        found.directories.add(target)  # or a kernel would make it
        target = None
    if not target:
        return []
    shared = _line(os.path.join(opened, target, "commondir"))
    common = _inside(source, target, shared) if shared else None
    return [target, common] if common else [target]


def _inside(source: str, *path: str) -> str | None:
    """Where *path*, as seen from *source*, leads in it, None where it leads out."""
    whole = os.path.join(source, *path)
    return (relative(real_path(whole), source) or None) if _can_be(whole) else None


def _can_be(path: str) -> bool:
    """Whether anybody could make something at *path*, which somebody's file names."""
    return "\0" not in path and all(len(os.fsencode(n)) < 256 for n in path.split("/"))


def _line(path: str) -> str:
    return os.fsdecode(read_start(path).partition(b"\n")[0])


def _look_at_repository(source: str, opened: str, git: str, covers: Covers, found: _Found) -> None:
    """*git* is the directory of a repository, relative to *source*."""

    def is_there(path: str) -> bool:
        return os.path.lexists(os.path.join(opened, path))

    is_bare = os.path.basename(git) != ".git"
    folder = git if is_bare else os.path.dirname(git)

    def place(name: str) -> str:
        own = name.removeprefix(".git/") if is_bare else name
        return os.path.normpath(os.path.join(folder, own))

    found.directories |= {place(name) for name in covers.repository_directories}
    found.frozen |= {path for path in map(place, covers.repository_frozen) if is_there(path)}
    missing = {place(name): text for name, text in covers.repository_placed}
    found.placed |= {path: text for path, text in missing.items() if not is_there(path)}
    named = {place(n) for n in (*covers.repository_directories, *covers.repository_frozen)}
    named = {path for path in named if os.path.islink(os.path.join(opened, path))}
    for path in (*named, *named_by_settings(opened, place(".git/config"), folder)):
        itself = relative(os.path.normpath(os.path.join(source, path)), source)
        for inside in {itself if _can_be(path) else None, _inside(source, path)}:
            if inside and inside not in found.directories:
                (found.frozen if is_there(inside) else found.directories).add(inside)


def bad_workdir(path: str, answer: str) -> SpecError:
    """The refusal of the work directory *path*."""
    return SpecError(
        attempt=f"use {path!r} as the work directory",
        answer=answer,
        remedy="Start the notebook in a directory of its own, or set workdir to one.",
    )
