"""Words between processes stand in one file, and both sides read what the other one writes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sandbox_provisioner
from sandbox_provisioner.inside import wire
from sandbox_provisioner.story import ExitFile

PACKAGE = Path(sandbox_provisioner.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Who calls these speaks to another process.
SPEAKERS = {"give_up", "message", "record", "report", "say_who", "send", "send_descriptors",
            "send_fds", "tell"}  # fmt: skip
# What a file system, and so a path, can hold: any bytes but NUL.
NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name)
PATHS = NAMES.map(lambda name: "/" + name.decode("utf-8", "surrogateescape"))


@given(st.lists(st.lists(st.binary(max_size=40), max_size=6), max_size=6))
def test_a_plan_is_read_as_it_is_written(plan):
    assert wire.decode(wire.encode(plan)) == plan


@given(st.lists(st.lists(PATHS, min_size=1, max_size=4), max_size=5))
def test_records_are_read_as_they_are_written_wherever_the_pipe_cuts_them(written):
    whole, rest, found = b"".join(wire.record(*words) for words in written), b"", []
    for byte in whole:
        new, rest = wire.records(rest + bytes((byte,)))
        found += new
    assert (found, rest) == (written, b"")


@given(PATHS)
def test_a_path_of_any_bytes_comes_with_its_word(path):
    """A cover may lie in a directory whose name is no UTF-8."""
    assert wire.parts(wire.message(wire.COVERED, path)) == (wire.COVERED, path)
    assert wire.from_hexadecimal(wire.in_hexadecimal(path)) == path


@given(st.integers(0, 255), st.integers(0, 64), PATHS, st.binary(max_size=40))
def test_an_exit_file_is_read_as_it_is_written(code, signal, path, tail):
    more = wire.in_hexadecimal(path)
    content = wire.exit_file(code, signal, f"{wire.COVER_LOST} {more}", tail)
    assert wire.read_exit_file(content) == (code, signal, wire.COVER_LOST, more, tail)
    assert wire.read_exit_file(wire.exit_file(code, signal, "", tail)) == (
        code, signal, "", "", tail,
    )  # fmt: skip


WORDS = st.sampled_from([b"0 ", b"137 ", b"memory-cap ", b"cover-lost ", b"ff", b"\xff", b"\n"])


@given(st.binary(max_size=100) | st.lists(WORDS, max_size=12).map(b"".join))
def test_any_bytes_are_read_as_something(text):
    """An exit file may be the work of a kernel that shares our mounts."""
    found = ExitFile.of(text)
    assert found.number >= 0
    assert found.text.isprintable()
    wire.parts(text)
    wire.records(text)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_who_speaks_to_another_process_takes_the_word_from_one_file(path):
    said = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in SPEAKERS:
            said += [ast.unparse(word) for word in node.args if isinstance(word, ast.Constant)]
    assert said == []
