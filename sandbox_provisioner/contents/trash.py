"""contents/trash.py - the Jupyter server: moves an entry to the person's trash, by descriptor.

The freedesktop.org trash, as send2trash keeps it. That one goes by names, and a kernel that works
in the home directory could make ``~/.local/share/Trash/files`` a link to where a login looks for
programs: what a person then deletes would be put there.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from datetime import datetime
from urllib.parse import quote

from sandbox_provisioner.contents.beneath import Beneath, Entry


def move_to_trash(entry: Entry, os_path: str) -> None:
    """Move *entry*, which a person knows as *os_path*, to the trash of its file system.

    Raises OSError, or beneath.Refused where a link stands in the trash's way.
    """
    device = os.lstat(entry.name, dir_fd=entry.folder_fd).st_dev
    base, folder = _trash_of(device, os.readlink(f"/proc/self/fd/{entry.folder_fd}"))
    for part in ("files", "info"):
        base.make_directories(os.path.join(base.root, folder, part))
    with _folder(base, folder, "info") as info, _folder(base, folder, "files") as files:
        name = _note(info, entry.name, os_path)
        try:
            entry.move(Entry(files.folder_fd, name, name))
        except BaseException:
            info.sibling(f"{name}.trashinfo").remove()
            raise


def _folder(base: Beneath, folder: str, part: str) -> contextlib.AbstractContextManager[Entry]:
    """An entry in a part of the trash, of which the descriptor is wanted."""
    return base.entry(os.path.join(base.root, folder, part, "any"))


def _trash_of(device: int, top: str) -> tuple[Beneath, str]:
    """The home's for what is on its file system, else one at the top of that of *top*."""
    home = os.path.expanduser("~")
    data = os.environ.get("XDG_DATA_HOME", "")
    base, folder = (data, "Trash") if data else (home, ".local/share/Trash")
    if os.path.isdir(base) and os.stat(base).st_dev == device:
        return Beneath(base), folder
    while not os.path.ismount(top):
        top = os.path.dirname(top)
    return Beneath(top), f".Trash-{os.getuid()}"


def _note(info: Entry, name: str, os_path: str) -> str:
    """Write the .trashinfo, which also reserves the name that is answered."""
    stem, dot, extension = name.partition(".")
    now = datetime.now().strftime("%Y-%m-%dT%H:%M:%S")
    text = f"[Trash Info]\nPath={quote(os_path)}\nDeletionDate={now}\n"
    for free in _names(stem, dot + extension):
        with contextlib.suppress(FileExistsError):
            fd = info.sibling(f"{free}.trashinfo").create(mode=0o600)
            with open(fd, "w", encoding="utf-8") as file:
                file.write(text)
            return free
    raise AssertionError("names do not end")


def _names(stem: str, extension: str) -> Iterator[str]:
    yield stem + extension
    yield from (f"{stem} {count}{extension}" for count in itertools.count(1))
