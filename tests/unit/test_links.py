"""Links that a kernel has left in its work directory lead no later start astray."""

from __future__ import annotations

import os

from sandbox_provisioner.links import real_path

LINKS = 3000


def chain(folder):
    """More links in a row than Python can follow; the first of them."""
    for number in range(LINKS):
        os.symlink(f"a{number + 1}", folder / f"a{number}")
    return folder / "a0"


def test_links_without_end_lead_to_themselves(tmp_path):
    first = str(chain(tmp_path))
    assert real_path(first) == first


def test_what_python_can_follow_is_followed(tmp_path):
    (tmp_path / "b").symlink_to("c")
    (tmp_path / "c").symlink_to("d")
    assert real_path(f"{tmp_path}/b/x") == f"{tmp_path.resolve()}/d/x"
