"""What grading decides without a kernel: what is read, kept, imported and told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jupyter_client.kernelspec import KernelSpec
from traitlets.config import Config

from sandbox_provisioner.ends import End
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.grade.book import Graded, opened
from sandbox_provisioner.grade.copies import copy, digest_of
from sandbox_provisioner.grade.imports import imports_of
from sandbox_provisioner.grade.kernels import BoxedManager, boxed
from sandbox_provisioner.grade.reading import MOST_BYTES, read_notebook
from sandbox_provisioner.grade.shown import Budget, weight
from sandbox_provisioner.grade.verdict import Place, cap_that_bit, stopped

CODE = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
END = End(
    kind="memory-cap", sentence="It ended.", time="", kernel_id="", kernel_name="", cell="",
    exit_code=None, signal=9, memory_limit_bytes=512 << 20, memory_peak_bytes=None,
    cpu_seconds=None, pids_limit_hits=0, full_bytes=None, path="", network=None, stderr_tail="",
)  # fmt: skip


def notebook(*cells: str) -> dict[str, Any]:
    made = [{**CODE, "source": source} for source in cells]
    return {"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}


# -- what is read


def nested(depth: int) -> str:
    return json.dumps(notebook()).replace(
        '"metadata": {}', f'"metadata": {{"a": {"[" * depth + "]" * depth}}}'
    )


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", "Expecting value"),
        ("[]", "it is no notebook"),
        ('{"cells": 1}', "it has no cells"),
        (json.dumps(notebook(*["1"] * 2001)), "or more than 2000"),
        (nested(60), "it is nested too deeply"),
        (nested(100_000), "it is nested too deeply"),
        (json.dumps(notebook() | {"cells": [1]}), "Could not read"),
        (json.dumps(notebook() | {"cells": [{**CODE, "source": 1}]}), "not all of its cells"),
        (" " * MOST_BYTES + "{}", "it is larger than 16 MiB"),
    ],
    ids=["empty", "list", "number", "many", "deep", "deeper", "no-cell", "no-source", "large"],
)  # fmt: skip
def test_what_is_no_notebook_is_an_error_that_says_why(
    text: str, answer: str, tmp_path: Path
) -> None:
    path = tmp_path / "nb.ipynb"
    path.write_text(text)
    with pytest.raises(SpecError, match=answer):
        read_notebook(path)


def test_a_notebook_that_is_a_link_or_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(json.dumps(notebook("1")))
    (tmp_path / "link").symlink_to("key")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SpecError, match="symbolic links"):
        read_notebook(tmp_path / "link")
    with pytest.raises(SpecError, match="it is no regular file"):
        read_notebook(tmp_path / "pipe")
    assert read_notebook(tmp_path / "key").cells[0].source == "1"


ANYTHING = st.recursive(
    st.none() | st.text() | st.integers(),
    lambda parts: st.lists(parts) | st.dictionaries(st.text(), parts),
)
CELLS = st.lists(
    st.fixed_dictionaries(dict.fromkeys(CODE, ANYTHING), optional={"source": ANYTHING})
)


@given(
    ANYTHING
    | st.fixed_dictionaries(
        {"cells": CELLS, "metadata": ANYTHING, "nbformat": st.just(4), "nbformat_minor": ANYTHING}
    )
)
def test_whatever_is_handed_in_as_a_notebook_is_one_or_an_error(found: Any) -> None:
    with tempfile.NamedTemporaryFile("w") as file:
        json.dump(found, file)
        file.flush()
        with contextlib.suppress(SpecError):
            book = read_notebook(Path(file.name))
            assert all(isinstance(cell.source, str) for cell in book.cells)


def test_a_copy_has_the_regular_files_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    source = tmp_path / "source"
    (source / "data").mkdir(parents=True)
    (source / "data/a.csv").write_text("1,2")
    (source / "nb.ipynb").write_text("{}")
    (source / "link").symlink_to("../key")
    (source / "above").symlink_to("..")
    os.mkfifo(source / "pipe")
    copy(source, tmp_path / "target", ["*.ipynb"])
    found = {
        str(path.relative_to(tmp_path / "target")) for path in (tmp_path / "target").rglob("*")
    }
    assert found == {"data", "data/a.csv"}


def test_a_digest_tells_names_and_contents_apart(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = digest_of(tmp_path)
    (tmp_path / "a").write_text("2")
    second = digest_of(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, digest_of(tmp_path)}) == 3


def test_the_book_knows_what_was_graded_whoever_was_killed_in_the_middle(tmp_path: Path) -> None:
    graded = Graded(student="ada", digest="1", verdict="", score=3.0, most=10.0)
    with opened(tmp_path, "ps1") as book:
        book.add(graded)
        with pytest.raises(SpecError, match="somebody is grading it now"), opened(tmp_path, "ps1"):
            pass
    with open(tmp_path / ".sandbox-grade/ps1.jsonl", "a") as file:
        file.write('{"student": "bob", "dig')
    with opened(tmp_path, "ps1") as book:
        assert (book.find("ada", "1"), book.find("ada", "2"), book.find("bob", "1")) == (
            graded, None, None,
        )  # fmt: skip
        book.add(replace(graded, student="eve"))
    with opened(tmp_path, "ps1") as book:
        assert book.find("eve", "1")


# -- what is kept


def said(kind: str, **content: Any) -> dict[str, Any]:
    return {"msg_type": kind, "content": content}


def test_what_decides_a_mark_is_kept_when_nothing_else_is_any_more() -> None:
    budget = Budget(10)

    def kept(message: dict[str, Any]) -> dict[str, Any] | None:
        return budget.admitted(message, weight(message))

    line = said("stream", name="stdout", text="x" * 6)
    assert kept(line) == line
    cut = kept(line)
    assert cut and "left out" in cut["content"]["text"]
    assert kept(line) is None
    assert kept(said("display_data", data={"image/png": "x"})) is None
    warned = kept(said("stream", name="stderr", text="x"))
    assert warned and warned["content"]["name"] == "stderr"
    result = kept(said("execute_result", data={"text/plain": "0.5", "image/png": "x" * 99}))
    assert result and result["content"]["data"] == {"text/plain": "0.5"}
    error = kept(said("error", ename="E", evalue="v", traceback=["x" * (1 << 20)]))
    assert error and (error["content"]["ename"], error["content"]["traceback"]) == ("E", [])
    assert kept(said("error", ename="F", evalue="v", traceback=[])) is None


# -- what is imported, asked for, told


def test_imports_are_found_between_magics_and_mistakes() -> None:
    cells = ("%matplotlib inline\nimport numpy as np, os.path", "from .own import x\n!ls", "def (")
    assert imports_of([notebook(*cells, "if 1:\n    from a.b import c\nhelp?")]) == (
        "numpy", "os.path", "a.b",
    )  # fmt: skip


def test_whatever_kernel_is_named_gets_a_box_with_nothing_of_the_host_to_write_to() -> None:
    plain = KernelSpec(argv=["python"], display_name="P", metadata={})
    config = Config({"SandboxProvisioner": {"pids_limit": 9}})
    stanza = boxed(plain, {"volumes": ["/a:/submission:ro"]}, config).metadata["kernel_provisioner"]
    assert stanza["provisioner_name"] == "sandbox-provisioner"
    assert stanza["config"]["workdir"] == "none"
    assert stanza["config"]["mem_limit"] == "1G"
    own = {
        "provisioner_name": "sandbox-provisioner",
        "config": {"mem_limit": "2G", "workdir": "/x"},
    }
    twin = KernelSpec(argv=["python"], display_name="P", metadata={"kernel_provisioner": own})
    again = boxed(twin, {"mem_limit": "3G"}, config).metadata["kernel_provisioner"]["config"]
    assert (again["mem_limit"], again["workdir"]) == ("3G", "none")
    assert own["config"]["workdir"] == "/x"  # the installed one is as it was


def test_a_verdict_tells_the_cap_and_the_cell() -> None:
    why = cap_that_bit(END)
    assert stopped(why, Place(7)) == "stopped: memory limit of 512 MiB, at cell 7"
    named = Place(3, "test\n1")
    assert (
        stopped(cap_that_bit(None), named)
        == "stopped: its kernel has ended, at cell 3 (test\\x0a1)"
    )
    assert cap_that_bit(replace(END, kind="cover-lost")) == "It ended"
    assert cap_that_bit(replace(END, kind="signal", signal=11)).endswith("signal 11 (SIGSEGV)")


# -- when a kernel is ready


def message(asked: str, **content: Any) -> dict[str, Any]:
    return {"parent_header": {"msg_id": asked} if asked else {}, "content": content}


def readied(shell: Iterator[Any], iopub: Iterator[Any], monkeypatch: Any) -> list[str]:
    """What a client does that waits for a kernel which says these, where None is silence."""
    done: list[str] = []
    client = BoxedManager().client_factory()

    def hears(words: Iterator[Any]) -> Any:
        async def get(timeout: float) -> Any:
            if (told := next(words)) is None:
                raise Empty
            return told

        return get

    async def upstream(timeout: float | None) -> None:
        done.append("waits as upstream")

    monkeypatch.setattr(client, "kernel_info", lambda: done.append("asks") or f"{len(done)}")
    monkeypatch.setattr(client, "get_shell_msg", hears(shell))
    monkeypatch.setattr(client, "get_iopub_msg", hears(iopub))
    monkeypatch.setattr(client, "_handle_kernel_info_reply", lambda _: done.append("knows it"))
    monkeypatch.setattr(client, "_async_wait_for_ready", upstream)
    asyncio.run(client.wait_for_ready(60))
    return done


def test_a_kernel_is_ready_when_it_is_heard_to_have_answered_this_question(
    monkeypatch: Any,
) -> None:
    said = (message("", execution_state="starting"), message("1", execution_state="busy"))
    idle = message("1", execution_state="idle")
    shell = iter([message("0"), message("1")])
    iopub = iter([message("0", execution_state="idle"), *said, idle, "more"])
    assert readied(shell, iopub, monkeypatch) == ["asks", "knows it"]
    assert next(iopub) == "more"
    # Nobody had been connected when it said so.
    iopub = iter([None, message("1", execution_state="idle"), message("2", execution_state="idle")])
    shell = iter([message("1"), message("2")])
    assert readied(shell, iopub, monkeypatch) == ["asks", "asks", "knows it"]


def test_a_kernel_that_says_nothing_soon_is_waited_for_as_upstream_does(monkeypatch: Any) -> None:
    found = readied(iter([None, message("2"), None]), iter([None]), monkeypatch)
    assert found == ["asks", "asks", "asks", "waits as upstream"]
