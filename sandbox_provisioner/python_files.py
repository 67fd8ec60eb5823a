"""python_files.py - reads only, whoever launches: where a Python will look for its modules.

An interpreter is not asked, since asking runs what lies in its environment (a ``.pth``, a
sitecustomize), outside of any sandbox, and a kernel may have put it there. Instead the same files
are read as CPython's getpath.py and site.py read::

    PROGRAM ─links─▶ the file behind it        bin/python3.11 tells the version
    pyvenv.cfg beside it or above              the prefix of a virtual environment, and its base
    lib/pythonX.Y/os.py above either           the base
    .../site-packages, PYTHONPATH, user site   modules; with *.pth, which name more folders

Of an ``import`` line in a .pth only the loader of an editable installation counts: what it names is
found as absolute paths in its text. Whatever is read is bounded, and only regular files are opened.

*Trusted* is a path that nothing has named that a kernel may write; who uses it decides on the rest.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sandbox_provisioner.links import real_path
from sandbox_provisioner.spec import relative

_MOST_LINKS = 40  # path_resolution(7)
_MOST_BYTES = 1 << 16
_MOST_ENTRIES = 20_000
_MOST_PTH_FILES = 256
_MOST_PATHS = 512
_LIBRARIES = ("lib", "lib64")
_VERSIONED = re.compile(r"(?:python|pypy)3\.\d+t?", re.ASCII)
_VERSION = re.compile(r"3\.\d+", re.ASCII)
_IMPORT = re.compile(r"import\s+(\w*editable\w*)", re.ASCII)
_STRING = re.compile(r"'(/[^'\\\n]*)'|\"(/[^\"\\\n]*)\"")
_MESON_INFO = "meson-info/meson-info.json"
_MESON_SOURCE = re.compile(r'"source": "(/[^"\\]*)"')
_LINK_TREE = "__editable__"
_STORES = ("archive-v0", "pkgs")  # of uv and conda, which link an environment's files to them


@dataclass(frozen=True, slots=True)
class Found:
    """A path, and whether all that named it is out of kernels' reach."""

    path: str
    trusted: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonFiles:
    """What an interpreter will look at. *environment* is what is installed; *modules* are further
    places that it was told of: PYTHONPATH, and what editable installations name.

    *user_base* is the value for PYTHONUSERBASE, "" without packages of the user's own. *versions*
    are the names that the folder of its library can have.
    """

    environment: tuple[Found, ...]
    modules: tuple[Found, ...]
    user_base: str = ""
    versions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads, and keeps in mind which places kernels may write: *writable*, real paths."""

    writable: tuple[str, ...]

    def trusts(self, place: str, above: bool = True) -> bool:
        """Whether what *place* says can be trusted, if what named *place* can (*above*)."""
        if not above:
            return False
        ways = {place, real_path(place), *links_on_way(place)}
        return not any(relative(way, root) is not None for way in ways for root in self.writable)

    def lines_of(self, path: str) -> list[str]:
        """The lines of a small text file, without spaces around them; none if it is not one."""
        text = read_start(path).decode("utf-8", "replace").removeprefix("\ufeff")
        return [line.strip() for line in text.splitlines()]


def read_start(path: str, most_bytes: int = _MOST_BYTES) -> bytes:
    """The first bytes of a regular file, b"" if it is none or cannot be read.

    An open of a device may act on it, and one of a FIFO waits: so it is looked at before.
    """
    with contextlib.suppress(OSError, ValueError):
        looked = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(looked).st_mode):
                return b""
            fd = _opened_to_read(looked, path)
        finally:
            os.close(looked)
        try:
            return os.read(fd, most_bytes)
        finally:
            os.close(fd)
    return b""


def _opened_to_read(looked: int, path: str) -> int:
    """What is open as *looked*, by the name *path* just now. From a box's root, whose /proc knows
    nothing of us, it is by its name once more: no device can be opened there (mount(2), MS_NODEV).
    """
    try:
        return os.open(f"/proc/self/fd/{looked}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if os.path.samestat(os.fstat(fd), os.fstat(looked)):
        return fd
    os.close(fd)
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)


def links_on_way(path: str) -> list[str]:
    """The symbolic links that Linux follows on its way to *path*, each by its own place."""
    found: list[str] = []
    left, walked = path.split("/")[::-1], ""
    while left and len(found) < _MOST_LINKS:
        name = left.pop()
        if name == "..":
            walked = os.path.dirname(walked)
        if name in {"", ".", ".."}:
            continue
        walked = f"{walked}/{name}"
        try:
            text = os.readlink(walked)
        except (OSError, ValueError):
            continue
        found.append(walked)
        left += text.split("/")[::-1]
        walked = "" if text.startswith("/") else os.path.dirname(walked)
    return found


def entries_of(folder: str) -> list[os.DirEntry[str]]:
    """The entries of *folder*, by name; none if it cannot be listed."""
    with contextlib.suppress(OSError, ValueError), os.scandir(folder) as entries:
        return sorted(itertools.islice(entries, _MOST_ENTRIES), key=lambda entry: entry.name)
    return []


def is_python(program: str) -> bool:
    """Whether *program* is an interpreter, by the name of the file behind it."""
    name = os.path.basename(real_path(program))
    return name.startswith(("python", "pypy")) and "-config" not in name


def find_python_files(
    program: str, words: Sequence[str], environment: Mapping[str, str], home: str, reader: Reader
) -> PythonFiles:
    """Read where *program*, with the command line *words* behind it, will look."""
    flags = flags_of(words)
    if flags & {"E", "I"}:
        environment = {}
    prefix, base, versions, settings = _prefixes(program, reader)
    with_base = settings.get("include-system-site-packages", "true").lower() == "true"
    prefixes = [found for found in (prefix, base) if found.path]
    user_base = ""
    if not flags & {"s", "I"} and not environment.get("PYTHONNOUSERSITE") and with_base:
        user_base = environment.get("PYTHONUSERBASE") or os.path.join(home, ".local")
    sites = list(_sites(prefixes if with_base else prefixes[:1], versions))
    if user_base:
        sites += [Found(f"{user_base}/lib/{version}/site-packages") for version in versions]
    sites = [site for site in sites if os.path.isdir(site.path)]
    modules = [*_python_path(environment), *_named_by(sites, reader)][:_MOST_PATHS]
    trees = [found for found in modules if _LINK_TREE in found.path]
    libraries = [Found(f"{base.path}/lib/{version}", base.trusted) for version in versions]
    return PythonFiles(
        environment=(*prefixes, *sites, *_stores((*libraries, *sites), reader)),
        modules=(*modules, *_stores(trees, reader)),
        user_base=user_base,
        versions=versions,
    )


def flags_of(words: Iterable[str]) -> frozenset[str]:
    """The letters of a Python's own options: everything before ``-c``, ``-m`` or a script."""
    letters: set[str] = set()
    words = iter(words)
    for word in words:
        if not word.startswith("-") or word in {"-", "--"} or word[1] in "cm":
            break
        if word[1] in "XW":
            if len(word) == 2:
                next(words, "")
            continue
        letters |= set(word[1:]) if not word.startswith("--") else set()
    return frozenset(letters)


# -- prefixes


def _prefixes(
    program: str, reader: Reader
) -> tuple[Found, Found, tuple[str, ...], Mapping[str, str]]:
    """The prefix ("" without a virtual environment), the base, the names of the folders that can be
    its library, such as "python3.11", and what pyvenv.cfg says."""
    folder = os.path.dirname(program)
    real = real_path(program)
    base_folder, trusted = os.path.dirname(real), reader.trusts(program)
    prefix, settings = Found(""), dict[str, str]()
    for place in (folder, os.path.dirname(folder)):
        settings = _settings(f"{place}/pyvenv.cfg", reader)
        if settings:
            prefix = Found(place)
            trusted = reader.trusts(f"{place}/pyvenv.cfg", trusted)
            base_folder = settings.get("home", base_folder)
            break
    versions = _versions(real, settings)
    base = _base(base_folder, versions) or _base(os.path.dirname(real), versions)
    if not base and os.path.basename(base_folder) == "bin":
        base = os.path.dirname(base_folder)
    known = versions or _all_versions([prefix.path, base])
    return prefix, Found(base, trusted), known, settings


def _settings(path: str, reader: Reader) -> dict[str, str]:
    pairs = (line.partition("=") for line in reader.lines_of(path))
    return {key.strip().lower(): value.strip() for key, equals, value in pairs if equals}


def _versions(real: str, settings: Mapping[str, str]) -> tuple[str, ...]:
    name = os.path.basename(real)
    if _VERSIONED.fullmatch(name):
        return (name,)
    told = _VERSION.match(settings.get("version_info") or settings.get("version", ""))
    kind = "pypy" if name.startswith("pypy") else "python"
    return (f"{kind}{told[0]}", f"{kind}{told[0]}t") if told else ()


def _base(folder: str, versions: tuple[str, ...]) -> str:
    """The nearest folder from *folder* upward that has a standard library, "" without one."""
    if not folder.startswith("/"):
        return ""
    folder = os.path.normpath(folder)
    while folder != "/":
        for library in _LIBRARIES:
            for version in versions or _all_versions([folder]):
                if os.path.isfile(f"{folder}/{library}/{version}/os.py"):
                    return folder
        folder = os.path.dirname(folder)
    return ""


def _all_versions(prefixes: Iterable[str]) -> tuple[str, ...]:
    """For an interpreter whose name and environment do not tell which one it is."""
    folders = [f"{prefix}/{library}" for prefix in prefixes if prefix for library in _LIBRARIES]
    names = (entry.name for folder in folders for entry in entries_of(folder))
    return tuple(sorted({name for name in names if _VERSIONED.fullmatch(name)}))


# -- modules


def _sites(prefixes: Iterable[Found], versions: tuple[str, ...]) -> Iterator[Found]:
    """site.getsitepackages(), with the folders that Debian has in place of them."""
    for prefix in prefixes:
        names = [f"{library}/{v}/site-packages" for library in _LIBRARIES for v in versions]
        names += [f"lib/{v}/dist-packages" for v in (*versions, "python3")]
        names += [f"local/lib/{v}/dist-packages" for v in versions]
        yield from (Found(f"{prefix.path}/{name}", prefix.trusted) for name in names)


def _python_path(environment: Mapping[str, str]) -> Iterator[Found]:
    for path in environment.get("PYTHONPATH", "").split(os.pathsep):
        if path.startswith("/"):
            yield Found(path)


def _named_by(sites: Iterable[Found], reader: Reader) -> Iterator[Found]:
    """What the .pth and .egg-link files of *sites* name."""
    for site in sites:
        trusted = reader.trusts(site.path, site.trusted)
        for name in _contents(site.path).settings:
            for line in reader.lines_of(f"{site.path}/{name}"):
                for path in _paths_of(line, site.path, reader):
                    yield Found(path, trusted)


def _paths_of(line: str, site: str, reader: Reader) -> Iterator[str]:
    """What one line of a .pth means; site.py takes a line for code if "import" stands before it."""
    if not line or line.startswith("#") or "\0" in line:
        return
    if not line.startswith(("import ", "import\t")):
        yield os.path.normpath(os.path.join(site, line))
        return
    loader = _IMPORT.match(line)
    if loader:
        for text in reader.lines_of(f"{site}/{loader[1]}.py"):
            for one, other in _STRING.findall(text):
                yield from _meant_by_loader(one or other, reader)


def _meant_by_loader(path: str, reader: Reader) -> Iterator[str]:
    """setuptools leaves a module's suffix out; meson-python names the folder that it builds in, and
    there stands where the sources are."""
    is_module = not os.path.exists(path) and os.path.isfile(f"{path}.py")
    yield f"{path}.py" if is_module else path
    for line in reader.lines_of(f"{path}/{_MESON_INFO}"):
        if told := _MESON_SOURCE.search(line):
            yield told[1]


def is_built_by_meson(path: str) -> bool:
    """Whether an editable installation of meson-python is built in the folder *path*."""
    return os.path.isfile(f"{path}/{_MESON_INFO}")


def _stores(sites: Iterable[Found], reader: Reader) -> Iterator[Found]:
    """Where the files of an environment made of links are: one of each package is looked at."""
    seen: set[str] = set()
    for site in sites:
        for link in _contents(site.path).links:
            target = os.path.normpath(os.path.join(os.path.dirname(link), _link_text(link)))
            store = _store_of(target, alone=os.path.dirname(link) == site.path)
            if store not in seen:
                seen.add(store)
                yield Found(store, reader.trusts(link, site.trusted))


@dataclass(frozen=True, slots=True)
class _Contents:
    """What matters of a folder of packages: the names of .pth files and their like, and links."""

    settings: tuple[str, ...]
    links: tuple[str, ...]


def _contents(site: str) -> _Contents:
    try:
        status = os.stat(site)
    except OSError:
        return _Contents((), ())
    # Of two users one may not list it, and who launches for both asks with the rights of either.
    if not os.access(site, os.R_OK, effective_ids=True):
        return _Contents((), ())
    return _contents_at(site, (status.st_dev, status.st_ino, status.st_mtime_ns))


@lru_cache(maxsize=64)
def _contents_at(site: str, _state: tuple[int, int, int]) -> _Contents:
    """There can be very many packages, and each start asks."""
    entries = entries_of(site)
    names = [entry.name for entry in entries if entry.name.endswith((".pth", ".egg-link"))]
    shown = [name for name in names if not name.startswith(".")]
    return _Contents(tuple(shown[:_MOST_PTH_FILES]), tuple(_links_among(site, entries)))


def _links_among(site: str, entries: Iterable[os.DirEntry[str]]) -> Iterator[str]:
    """Links in *site*: a module or its folder; METADATA, where the folders are made and the files
    are links; what setuptools makes in its strict mode."""
    for entry in entries:
        inner = f"{entry.path}/__init__.py" if _LINK_TREE in site else ""
        if entry.name.endswith(".dist-info"):
            inner = f"{entry.path}/METADATA"
        if entry.is_symlink():
            yield entry.path
        elif inner and os.path.islink(inner):
            yield inner


def _link_text(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return "."


def _store_of(target: str, *, alone: bool) -> str:
    """What to show where a link leads to *target*: the whole store, else the target if it stands
    *alone*, else the folder that it lies in."""
    parts = target.split("/")
    for name in _STORES:
        if name in parts[:-1]:
            return "/".join(parts[: parts.index(name) + 1])
    return target if alone else os.path.dirname(target)
