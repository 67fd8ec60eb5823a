"""Nothing that a kernel wrote or named reaches a terminal, a log or a dialog raw."""

from __future__ import annotations

import os
import sys
import unicodedata

import pytest

from sandbox_provisioner.app.tables import table
from sandbox_provisioner.errors import LaunchError, SpecError
from sandbox_provisioner.inside.printable import one_line, printable, printable_bytes
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.plan import Step

TITLE = "\x1b]0;you are root\x07"
FORGED = "/srv/a\n[I 2026-01-01 00:00:00 ServerApp] all is well"


def test_no_control_character_is_left_and_nothing_else_is_changed():
    for code in range(sys.maxunicode + 1):
        letter = chr(code)
        shown = printable(letter)
        is_control = unicodedata.category(letter) in {"Cc", "Cs", "Zl", "Zp"}
        if is_control and letter not in "\n\t":
            assert shown.isascii(), hex(code)
            assert shown.isprintable(), hex(code)
        elif unicodedata.bidirectional(letter) not in {"LRE", "RLE", "LRO", "RLO", "PDF"}:
            assert shown == letter or unicodedata.category(letter) == "Cf", hex(code)


def test_letters_that_turn_the_order_around_are_shown_as_numbers():
    assert printable("a\u202egnp.exe") == "a\\u202egnp.exe"
    assert printable("\u2066\u061c") == "\\u2066\\u061c"


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"\x1b[2J", b"\\x1b[2J"),
        (b"Gr\xc3\xbc\xc3\x9fe\n\ta", b"Gr\xc3\xbc\xc3\x9fe\n\ta"),
        (b"\xc2\x9b31m", b"\\x9b31m"),  # CSI in UTF-8
        (b"\x9b31m\xff", b"\\x9b31m\\xff"),  # CSI for a terminal with eight bits
        (b"50 %\r100 %\r\n", b"50 %\\x0d100 %\\x0d\n"),
    ],
)
def test_bytes_are_made_printable_as_text_is(data, shown):
    assert printable_bytes(data) == shown


def test_what_is_printable_stays_when_it_is_made_printable_again():
    once = printable(TITLE + FORGED)
    assert printable(once) == once


def test_a_name_with_a_new_line_makes_no_second_line_of_an_error():
    error = SpecError(attempt=f"use {FORGED}", answer=f"{TITLE}{FORGED}", remedy=f"Move {FORGED}.")
    assert "\n" not in str(error)
    assert "\x1b" not in str(error)
    assert "/srv/a\\x0a[I 2026" in error.attempt


def test_the_last_words_of_a_kernel_are_set_in_below_an_error():
    told = f"{TITLE}first\n[I 2026-01-01 00:00:00 ServerApp] forged\n"
    error = LaunchError(attempt="a", answer="b", remedy="c.", step="execute", stderr_tail=told)
    first, *lines = str(error).splitlines()
    assert first == "Could not a: [execute] b. c."
    assert lines[0] == "The last lines that it wrote:"
    assert lines[1:] == [
        "    \\x1b]0;you are root\\x07first",
        "    [I 2026-01-01 00:00:00 ServerApp] forged",
    ]


def test_a_name_that_is_no_utf_8_can_be_printed():
    name = os.fsdecode(b"/srv/\xff")
    assert str(SpecError(attempt=f"use {name}", answer="b", remedy="c.")).encode()


def test_what_is_told_once_is_not_kept_at_its_length() -> None:
    told: list[str] = []
    known: set[str] = set()
    launcher = LocalLauncher(warn=told.append, told=known)
    for text in ("x" * 100_000, "x" * 100_000, "\udcff"):
        launcher.tell_once(text)
    assert len(told) == 2
    assert max(map(len, known)) <= 64


def test_a_warning_is_one_line_and_printable():
    told: list[str] = []
    LocalLauncher(warn=told.append).warn(f"{FORGED} {TITLE}")
    assert told == [one_line(f"{FORGED} {TITLE}")]
    assert told[0].isprintable()


def test_a_table_and_a_step_show_names_as_text():
    shown = table([["name"], [TITLE + FORGED]])
    assert len(shown.splitlines()) == 3
    assert "\x1b" not in shown
    assert "\x1b" not in Step("take", (TITLE,), "").describe()
