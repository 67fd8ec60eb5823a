"""contents/manager.py - the Jupyter server: its contents manager, by descriptors in place of names.

A thin subclass: what jupyter_server decides (models, hooks, hidden files, trust, names of copies)
stays its own. Replaced are the places at which it opens, makes, moves or removes something.

- Writes, deletes and renames go through no link at all, also not through one that stays below
  root_dir: where that is a home directory, ``nb.ipynb -> .bashrc`` is the same attack.
- Reads follow links that stay below root_dir and lead to nothing hidden. Copies follow none, since
  a kernel can read what was copied into its work directory.
- Names, sizes and types in a listing are still looked up by name: they are shown to a person.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from typing import IO, Any

import nbformat
from anyio.to_thread import run_sync
from jupyter_core.paths import is_hidden
from jupyter_server.services.contents.fileio import AsyncFileManagerMixin
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from tornado.web import HTTPError
from traitlets import default

from sandbox_provisioner.contents.beneath import Beneath, Entry, Refused, copy_over, copy_tree, move
from sandbox_provisioner.contents.trash import move_to_trash
from sandbox_provisioner.templates import keep_templates_out

# False while a file is read in order to be written elsewhere.
_follows_links: ContextVar[bool] = ContextVar("follows_links", default=True)


class ByDescriptor(AsyncFileManagerMixin):
    """What the contents manager and its checkpoints have in common: how a file is opened."""

    root_dir: str

    def beneath(self, os_path: str) -> Beneath:
        """What *os_path* has to be below of."""
        return Beneath(self.root_dir)

    @contextlib.contextmanager
    def entry(self, os_path: str) -> Iterator[Entry]:
        """The directory of *os_path*, opened, and a name in it; what may not be is a 403."""
        with self.perm_to_403(os_path), self.beneath(os_path).entry(os_path) as entry:
            yield entry

    @contextlib.contextmanager
    def perm_to_403(self, os_path: str = "") -> Iterator[None]:
        """Turn what was refused into an answer that a front end shows."""
        try:
            with super().perm_to_403(os_path):
                yield
        except Refused as error:
            raise HTTPError(403, str(error)) from None

    @contextlib.contextmanager
    def open(self, os_path: str, mode: str = "r", **options: Any) -> Iterator[IO[Any]]:
        """Open to read; the base class opens by name."""
        links = _follows_links.get()
        below = self.beneath(os_path)
        with (
            self.perm_to_403(os_path),
            below.readable(os_path, links=links, hidden=self._shows_hidden()) as fd,
            open(fd, mode, closefd=False, **options) as file,
        ):
            yield file

    def _shows_hidden(self) -> bool:
        return True

    @contextlib.contextmanager
    def atomic_writing(
        self, os_path: str, text: bool = True, encoding: str = "utf-8", **kwargs: Any
    ) -> Iterator[IO[Any]]:
        """Write in place, and bring back what was there if the body fails."""
        how = {"mode": "w", "encoding": encoding, "newline": "\n"} if text else {"mode": "wb"}
        with (
            self.entry(os_path) as entry,
            entry.written(backup=self.use_atomic_writing) as fd,
            open(fd, closefd=False, **{**how, **kwargs}) as file,
        ):
            yield file

    async def _read_notebook(
        self,
        os_path: str,
        as_version: int = 4,
        capture_validation_error: Any = None,
        raw: bool = False,
    ) -> Any:
        """The base class looks for what its own writing may have left, and moves files by name."""
        text, _, content = await self._read_file(os_path, "text", raw=True)  # type: ignore[misc]
        read = partial(
            nbformat.reads, as_version=as_version, capture_validation_error=capture_validation_error
        )
        try:
            notebook = await run_sync(read, text)
        except Exception as error:
            raise HTTPError(400, f"Unreadable Notebook: {os_path} {error!r}") from error
        return (notebook, content) if raw else notebook

    async def _copy(self, src: str, dest: str) -> None:
        """Copy a file for a checkpoint, or back; through no link on either side."""
        with self.entry(src) as source, self.entry(dest) as target:
            await run_sync(copy_over, source, target)


class SandboxContentsManager(ByDescriptor, AsyncLargeFileManager):  # type: ignore[misc]
    """``c.ServerApp.contents_manager_class``: AsyncLargeFileManager by descriptors."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        keep_templates_out(self)  # what a kernel of yesterday has left waits for no kernel of today

    @default("checkpoints_class")
    def _checkpoints_class_default(self) -> Any:
        from sandbox_provisioner.contents.checkpoints import SandboxCheckpoints  # noqa: PLC0415

        return SandboxCheckpoints

    @default("files_handler_class")
    def _files_handler_class_default(self) -> Any:
        from sandbox_provisioner.contents.files import SandboxFilesHandler  # noqa: PLC0415

        return SandboxFilesHandler

    def _shows_hidden(self) -> bool:
        return bool(self.allow_hidden)

    def _get_os_path(self, path: str) -> str:
        os_path: str = super()._get_os_path(path)
        with self.perm_to_403(os_path):
            self.beneath(os_path).refuse_way_out(os_path)
        return os_path

    async def _dir_model(self, path: str, content: bool = True) -> Any:
        os_path = self._get_os_path(path)
        if content and not self.allow_hidden and os.path.isdir(os_path):
            with self.perm_to_403(os_path):
                self.beneath(os_path).refuse_hidden_directory(os_path)
        return await super()._dir_model(path, content=content)

    async def _save_large_file(self, os_path: str, content: str, format: str | None) -> None:
        """A further piece of an upload."""
        if format not in {"text", "base64"}:
            raise HTTPError(400, "Must specify format of file contents as 'text' or 'base64'")
        try:
            piece = content.encode() if format == "text" else base64.b64decode(content)
        except ValueError as error:
            raise HTTPError(400, f"Encoding error saving {os_path}: {error}") from error
        with (
            self.entry(os_path) as entry,
            entry.appended() as fd,
            open(fd, "wb", closefd=False) as file,
        ):
            await run_sync(file.write, piece)

    async def _save_directory(self, os_path: str, model: Any, path: str = "") -> None:
        self._refuse_hidden("create", os_path)
        with self.entry(os_path) as entry:
            status = entry.status()
            if status is None:
                await run_sync(partial(os.mkdir, entry.name, dir_fd=entry.folder_fd))
            elif not stat.S_ISDIR(status.st_mode):
                raise HTTPError(400, f"Not a directory: {os_path}")

    async def delete_file(self, path: str) -> None:
        """Delete what stands at *path*; of a link the link itself."""
        os_path = self._get_os_path(path.strip("/"))
        self._refuse_hidden("delete", os_path)
        with self.entry(os_path) as entry:
            status = entry.status()
            if status is None:
                raise HTTPError(404, f"File or directory does not exist: {os_path}")
            if self.delete_to_trash:
                self._require_writable(path, status)
                await self._in_thread(f"delete {path!r}", move_to_trash, entry, os_path)
            elif stat.S_ISDIR(status.st_mode):
                self._require_empty(entry, os_path)
                remove = partial(shutil.rmtree, entry.name, dir_fd=entry.folder_fd)
                await self._in_thread(f"delete {path!r}", remove)
            else:
                await run_sync(entry.remove)

    def _require_writable(self, path: str, status: os.stat_result) -> None:
        if not stat.S_ISLNK(status.st_mode) and not self.is_writable(path):
            raise HTTPError(403, f"Permission denied: {path}")

    def _require_empty(self, entry: Entry, os_path: str) -> None:
        """A directory with nothing but checkpoints counts as empty."""
        if self.always_delete_dir:
            return
        with entry.directory() as fd:
            names = set(os.listdir(fd))
        if names - {getattr(self.checkpoints, "checkpoint_dir", None)}:
            raise HTTPError(400, f"Directory {os_path} not empty")

    async def rename_file(self, old_path: str, new_path: str) -> None:
        """Move what stands at *old_path*; a link itself, and over nothing."""
        old_path, new_path = old_path.strip("/"), new_path.strip("/")
        if new_path == old_path:
            return
        new_os_path, old_os_path = self._get_os_path(new_path), self._get_os_path(old_path)
        for os_path in (old_os_path, new_os_path):
            self._refuse_hidden("rename", os_path)
        with self._found(old_path), self.entry(old_os_path) as old, self.entry(new_os_path) as new:
            before, there = old.status(), new.status()
            if before is None:
                raise HTTPError(404, f"File or directory does not exist: {old_path}")
            if there is not None and not os.path.samestat(before, there):
                raise HTTPError(409, f"File already exists: {new_path}")
            await self._in_thread(f"rename {old_path!r} to {new_path!r}", move, old, new)

    @contextlib.contextmanager
    def _found(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise HTTPError(404, f"File or directory does not exist: {path}") from None

    async def copy(self, from_path: str, to_path: str | None = None) -> Any:
        """Copy a file or a directory, through no link."""
        token = _follows_links.set(False)
        try:
            return await super().copy(from_path, to_path)
        finally:
            _follows_links.reset(token)

    async def _copy_dir(
        self, from_path: str, to_path_original: str, to_name: str, to_path: str
    ) -> dict[str, Any]:
        source_path = self._get_os_path(from_path.strip("/"))
        folder = self._get_os_path(to_path_original.strip("/"))
        with self.perm_to_403(folder):
            self.beneath(folder).make_directories(folder)
        with self.entry(source_path) as source, self.entry(f"{folder}/{to_name}") as target:
            await self._in_thread(f"copy {from_path!r} to {to_path!r}", copy_tree, source, target)
        model: dict[str, Any] = await self.get(to_path, content=False)
        return model

    def _refuse_hidden(self, act: str, os_path: str) -> None:
        if not self.allow_hidden and is_hidden(os_path, self.root_dir):
            raise HTTPError(400, f"Cannot {act} hidden file or directory {os_path!r}")

    async def _in_thread(self, act: str, call: Any, *args: Any) -> None:
        """What a file system answers to a big act is a person's to know, and not an error of ours;
        a tree that is too deep for Python is one that a kernel has made."""
        try:
            await run_sync(call, *args)
        except (OSError, RecursionError) as error:
            self.log.error("Could not %s: %s", act, error)
            reason = getattr(error, "strerror", None) or error
            raise HTTPError(400, f"Could not {act}: {reason}") from error
