"""facilities/rights/inside/modes.py: what PID 1 makes of what a kernel asks it for."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from sandbox_provisioner.facilities.rights.inside import modes


@pytest.mark.parametrize("length", [0, 1, 4095])
def test_a_path_may_be_as_long_as_linux_lets_it_be(length: int) -> None:
    memory = ctypes.create_string_buffer(b"1" * length)
    assert modes._text_at(os.getpid(), ctypes.addressof(memory)) == b"1" * length


@pytest.mark.parametrize("length", [4096, 4400, 9000])
def test_a_longer_path_is_no_path_wherever_it_lies_in_memory(length: int) -> None:
    memory = ctypes.create_string_buffer(b"1" * length)
    with pytest.raises(OSError, match="File name too long"):
        modes._text_at(os.getpid(), ctypes.addressof(memory))


@pytest.mark.parametrize("mistake", [ValueError, KeyError, IndexError])
def test_what_cannot_be_meant_is_refused_and_ends_nobody(
    mistake: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(*_: object) -> None:
        raise mistake

    answers: list[tuple[object, ...]] = []
    watcher = modes.Modes()
    monkeypatch.setattr(modes.kernel, "asked", lambda _: (7, os.getpid(), 90, ()))
    monkeypatch.setattr(modes.kernel, "answer", lambda *told: answers.append(told))
    monkeypatch.setattr(watcher, "_change", change)
    watcher._answer()
    assert answers == [(-1, 7, errno.EPERM)]
