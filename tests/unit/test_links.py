"""Links that a kernel has left in its work directory lead no later start astray."""

from __future__ import annotations

import os
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_provisioner import links
from sandbox_provisioner.links import real_path

LINKS = 3000
# In one path, by Linux.
FOLLOWED = 40


def paths(*names):
    """Of these, or of what is above."""
    parts = st.sampled_from((*names, "..", ".", ""))
    return st.lists(parts, min_size=1, max_size=5).map("/".join).filter(bool)


def chain(folder):
    """More links in a row than Python up to 3.12 can follow; the first of them."""
    for number in range(LINKS):
        os.symlink(f"a{number + 1}", folder / f"a{number}")
    return folder / "a0"


def test_links_without_end_lead_to_themselves(tmp_path):
    first = str(chain(tmp_path))
    assert real_path(first) == first


@pytest.mark.parametrize(
    ("path", "end"),
    [
        ("a0", "a0"),
        ("a0/x/../y", "a0/y"),
        ("missing/../a0", "a0"),
        ("a0/../out", "inside"),
        (f"a{LINKS - FOLLOWED - 1}", f"a{LINKS - FOLLOWED - 1}"),
        (f"a{LINKS - FOLLOWED}/x", f"a{LINKS}/x"),
    ],
)
def test_no_more_links_in_a_row_are_followed_than_by_linux(tmp_path, monkeypatch, path, end):
    chain(tmp_path)
    (tmp_path / "out").symlink_to("inside")
    asked, readlink = [], os.readlink
    monkeypatch.setattr(os, "readlink", lambda path: asked.append(path) or readlink(path))
    assert real_path(f"{tmp_path}/{path}") == f"{tmp_path}/{end}"
    assert len(asked) < 2 * FOLLOWED


def test_many_links_that_each_lead_somewhere_are_followed(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/up").symlink_to("../d")
    path = f"{tmp_path}/d" + "/up" * 3 * FOLLOWED
    assert real_path(path) == f"{tmp_path}/d"


def test_what_python_can_follow_is_followed(tmp_path):
    (tmp_path / "b").symlink_to("c")
    (tmp_path / "c").symlink_to("d")
    assert real_path(f"{tmp_path}/b/x") == f"{tmp_path.resolve()}/d/x"


# No link leads to itself: of such a one either tells another part.
@given(paths("c", "d"), paths("a", "c", "d"), paths("a", "b", "c", "d"), st.booleans())
def test_what_is_found_out_is_what_python_finds(a, b, path, absolute):
    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(f"{folder}/c/d/c")
        os.symlink(f"{folder}/{a}" if absolute else a, f"{folder}/a")
        os.symlink(b, f"{folder}/c/b")
        found = links._found_out(f"{folder}/{path}")
        assert found == os.path.realpath(f"{folder}/{path}")


def test_a_relative_path_begins_where_we_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert links._found_out("x/./y/../z") == f"{tmp_path}/x/z"
    assert (links._found_out("//x"), links._found_out("/..")) == ("/x", "/")
