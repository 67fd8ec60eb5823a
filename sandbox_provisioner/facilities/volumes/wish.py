"""facilities/volumes/wish.py - pure: how people write volumes.

There is one notation, "SOURCE:TARGET[:OPTIONS]", which `spec.Volume` reads; a dictionary as that of
DockerSpawner is another spelling of a list of these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from traitlets import List, Unicode

from sandbox_provisioner.errors import SpecError

Written = Sequence[str] | Mapping[str, Any]
USERNAME = "{username}"
READ_ONLY, WRITABLE = "ro", "rw"
# One name of a path, neither "." nor "..", and no end of the source either.
_PLAIN_NAME = re.compile(r"(?!\.)[^/:\0-\x1f\x7f]+")
_REMEDY = (
    'Write "SOURCE:TARGET", with ":ro" or ":rw" behind it, in a list; or {"SOURCE": "TARGET"} or '
    '{"SOURCE": {"bind": "TARGET", "mode": "ro"}}. Both paths are absolute.'
)


class Volumes(List[str]):
    """A list of texts, or a dictionary, which stays what it is: `as_texts` reads both."""

    def __init__(self, **words: Any) -> None:
        super().__init__(Unicode(), **words)

    def validate(self, obj: Any, value: Any) -> Any:
        """What cannot be meant `as_texts` tells, with its reason."""
        return dict(value) if isinstance(value, Mapping) else super().validate(obj, value)


def as_texts(written: Written, usual: str = READ_ONLY) -> list[str]:
    """The volumes of either spelling as texts; *usual* is how those of a dictionary are shown that
    have no mode."""
    if not isinstance(written, Mapping):
        return list(written)
    return [_as_text(source, told, usual) for source, told in written.items()]


def _as_text(source: Any, told: Any, usual: str) -> str:
    bind = told if isinstance(told, Mapping) else {"bind": told}
    target, mode = bind.get("bind"), bind.get("mode", usual)
    words = [word for word in (source, target, mode) if isinstance(word, str)]
    plain = len(words) == 3 and all(word and ":" not in word for word in words)
    if not plain or set(bind) - {"bind", "mode"}:
        answer = f"{source!r}: {told!r} is not a volume"
        raise SpecError(attempt="read volumes", answer=answer, remedy=_REMEDY)
    return ":".join(words)


def without_mode(written: Written) -> list[str]:
    """The sources that a dictionary shows without saying how."""
    if not isinstance(written, Mapping):
        return []
    return [
        source
        for source, told in written.items()
        if not (isinstance(told, Mapping) and "mode" in told)
    ]


def filled_in(text: str, name: str) -> str:
    """*text* for the user called *name*, where it names one; SpecError for a name that would lead a
    path elsewhere: names come from databases that not only root of this machine writes."""
    if USERNAME not in text:
        return text
    check_name(name)
    return text.replace(USERNAME, name)


def check_name(name: str) -> None:
    """Refuse the *name* of a user that is no name of a directory; SpecError."""
    if not _PLAIN_NAME.fullmatch(name):
        raise SpecError(
            attempt=f"put the name of the user {name!r} into a path",
            answer="it is not the plain name of one directory",
            remedy="Name the directory itself in place of {username}.",
        )
