"""contents/files.py - the Jupyter server: ``/files/…``, for downloads and pictures."""

from __future__ import annotations

import os
from typing import IO

from jupyter_server.base.handlers import AuthenticatedFileHandler
from tornado.web import HTTPError

from sandbox_provisioner.contents.beneath import Beneath, Refused


class SandboxFilesHandler(AuthenticatedFileHandler):
    """Sends what a descriptor holds, which was judged, whatever stands at the name meanwhile."""

    _file: IO[bytes] | None = None
    _name = ""

    def validate_absolute_path(self, root: str, absolute_path: str) -> str:
        """Called by tornado with what a person asked for; the path that is answered is sent."""
        self._name = super().validate_absolute_path(root, absolute_path)
        hidden = self.contents_manager.allow_hidden
        try:
            with Beneath(root).readable(self._name, links=True, hidden=hidden) as fd:
                self._file = open(os.dup(fd), "rb")  # noqa: SIM115 - until on_finish
        except (Refused, PermissionError) as error:
            raise HTTPError(403, str(error)) from None
        except FileNotFoundError:
            raise HTTPError(404) from None
        return f"/proc/self/fd/{self._file.fileno()}"

    def get_content_type(self) -> str:
        """By the name that was asked for."""
        opened, self.absolute_path = self.absolute_path, self._name
        try:
            return super().get_content_type()
        finally:
            self.absolute_path = opened

    def on_finish(self) -> None:
        """Called by tornado when the answer is out."""
        if self._file:
            self._file.close()
        super().on_finish()
