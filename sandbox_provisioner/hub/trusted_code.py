"""trusted_code.py - in a hub user's Jupyter server: it runs nothing that its user may change.

Called in a configuration of root's, ``/etc/jupyter/jupyter_server_config.py``::

    from sandbox_provisioner.hub.trusted_code import run_trusted_code_only

    run_trusted_code_only(c)

The hub's ``disable_user_config`` holds for the server itself. An extension may be an application of
its own, whose configuration, a program, it looks for in ~/.jupyter, in the current directory, and
wherever it likes; and it may put the current directory first on sys.path. nbgrader does all three.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex

from traitlets.config.loader import FileConfigLoader, JSONFileConfigLoader, PyFileConfigLoader

from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.spec import relative
from sandbox_provisioner.trust import Writer, changeable


def run_trusted_code_only(c: Any) -> None:
    """From now on, in this process: configuration files, modules and entry points that its user may
    change do not count, whoever looks for them; nor do nbconvert's templates in the current
    directory. *c* is the configuration of the server."""
    c.TemplateExporter.extra_template_basedirs = []
    # Of what the server starts: no module comes from the directory that it happens to be in.
    os.environ["PYTHONSAFEPATH"] = "1"
    if is_trusted_code_only():
        return
    sys.path = ImportPath(sys.path)
    # Both have the method by which they read the file that was found. An application passes over
    # what has nothing to say.
    for loader in (PyFileConfigLoader, JSONFileConfigLoader):
        read: Callable[[Any], Any] = loader._read_file_as_dict
        setattr(loader, read.__name__, _only_trusted(read))


def is_trusted_code_only() -> bool:
    """Whether that has been called."""
    return isinstance(sys.path, ImportPath)


def _only_trusted(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(read)
    def read_trusted(loader: FileConfigLoader) -> Any:
        path = os.path.abspath(loader.full_filename)
        place = changeable(path, Writer.this_process())
        if not place:
            return read(loader)
        loader.log.warning(
            "%s is not read: the user of this server may change %s", one_line(path), one_line(place)
        )
        return {}

    return read_trusted


class ImportPath(list[str]):
    """sys.path, without what the user of this process may change.

    Not only modules would come from there: the metadata of a package (``*.dist-info``) says who
    starts kernels. So it is with what is made of it by "+", slices and `copy`. What belongs to the
    running Python stays; where that is the user's own, nothing of this holds, and doctor tells."""

    def __init__(self, paths: Iterable[str] = ()) -> None:
        super().__init__(filter(_is_trusted, paths))

    def append(self, path: str) -> None:
        """As of a list."""
        self.extend([path])

    def extend(self, paths: Iterable[str]) -> None:
        """As of a list."""
        super().extend(filter(_is_trusted, paths))

    def __iadd__(self, paths: Iterable[str]) -> ImportPath:  # type: ignore[override]
        self.extend(paths)
        return self

    def __add__(self, paths: Iterable[str]) -> ImportPath:  # type: ignore[override]
        return ImportPath([*self, *paths])

    def __radd__(self, paths: Iterable[str]) -> ImportPath:
        return ImportPath([*paths, *self])

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return ImportPath(found) if isinstance(index, slice) else found

    def copy(self) -> ImportPath:
        """As of a list."""
        return ImportPath(self)

    def insert(self, index: SupportsIndex, path: str) -> None:
        """As of a list."""
        if _is_trusted(path):
            super().insert(index, path)

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            super().__setitem__(index, filter(_is_trusted, value))
        elif _is_trusted(value):
            super().__setitem__(index, value)


def _is_trusted(path: Any) -> bool:
    if not isinstance(path, str):
        return False  # no module is looked for there
    if not os.path.isabs(path):
        return False  # it leads elsewhere with each current directory
    place = os.path.abspath(path)
    return _is_pythons_own(place) or not changeable(place, Writer.this_process())


def _is_pythons_own(place: str) -> bool:
    prefixes = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    return any(relative(place, prefix) is not None for prefix in prefixes)
