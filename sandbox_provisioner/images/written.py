"""written.py - in who makes images and kernelspecs, reads only: a TOML file that a person wrote.

What is wrong in it is told with its line.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sandbox_provisioner.errors import SandboxError, SpecError, did_you_mean
from sandbox_provisioner.policy.lines import Lines, NotToml, read_toml
from sandbox_provisioner.policy.lines import Path as Keys

_LONGEST = 1 << 20


@dataclass(frozen=True, slots=True)
class Written:
    """What the file at *path* says, and where."""

    path: Path
    found: Mapping[str, Any]
    lines: Lines

    @classmethod
    def read(cls, path: str) -> Written:
        """SpecError where there is no such file, or none in TOML."""
        content = read_bytes(Path(path))
        try:
            return cls(Path(path), *read_toml(content))
        except NotToml as error:
            raise _wrong(path, error.line, error.answer, error.remedy) from None

    def know(self, known: Collection[str], hints: Mapping[str, str] | None = None) -> None:
        """SpecError for a key that is none of *known*; *hints* has words that people may mean."""
        for name in self.found:
            if name not in known:
                meant = (hints or {}).get(name)
                otherwise = f"Known are: {', '.join(known)}."
                hint = f"Did you mean {meant!r}?" if meant else did_you_mean(name, known, otherwise)
                self.refuse((name,), f"it has no {name!r}", hint)

    def text(self, name: str, otherwise: str = "") -> str:
        """The text *name*; SpecError where it is none."""
        value = self.found.get(name, otherwise)
        if not isinstance(value, str):
            self.refuse((name,), f"{name} is no text", f'Write {name} = "...".')
        return str(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """The texts *name*, one or several; SpecError."""
        value = self.found.get(name, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
            self.refuse((name,), f"{name} is no list of texts", f'Write {name} = ["...", "..."].')
        return tuple(values)

    def refuse(self, keys: Keys, answer: str, remedy: str) -> NoReturn:
        """Raise the SpecError that tells what is wrong at *keys*."""
        raise _wrong(str(self.path), self.lines.of(keys), answer, remedy)

    def refuse_as(self, keys: Keys, error: SandboxError) -> NoReturn:
        """The same with what *error* says."""
        self.refuse(keys, f"{error.answer} ({error.attempt})", error.remedy)


def opened_plainly(path: Path) -> int:
    """A descriptor of the file *path*, to read it."""
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)


def read_bytes(path: Path, opened: Callable[[Path], int] = opened_plainly) -> bytes:
    """What a file has that a person names, and *opened* opens, no more than a person writes;
    SpecError."""
    attempt = f"read {path}"
    try:
        with open(path, "rb", opener=lambda path, _: opened(Path(path))) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise SpecError(attempt=attempt, answer="it is no file", remedy="Name a file.")
            content = file.read(_LONGEST + 1)
    except OSError as error:
        raise SpecError(
            attempt=attempt,
            answer=error.strerror or str(error),
            remedy="Name a file that is there.",
        ) from None
    if len(content) > _LONGEST:
        raise SpecError(attempt=attempt, answer="it has more than 1 MiB", remedy="Name another.")
    return content


def _wrong(path: str, line: int, answer: str, remedy: str) -> SpecError:
    where = f", line {line}" if line else ""
    return SpecError(attempt=f"use {path}{where}", answer=answer, remedy=remedy)
