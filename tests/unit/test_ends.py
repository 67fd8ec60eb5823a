"""An end as data: when it is told, what stands in a notebook, and that the page tells of all."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from sandbox_provisioner.contract import Labels
from sandbox_provisioner.ends import MIME, End, ends_in
from sandbox_provisioner.provisioner import _is_news
from sandbox_provisioner.story import ExitStory, with_reason
from sandbox_provisioner.told import EndKind

PAGE = Path(__file__).parents[2] / "docs/ends.md"
LABELS = Labels(kernel_id="k" * 36, name="R")


def end_of(kind: EndKind, code: int | None = None, cell: str = "", **story: Any) -> End:
    told = with_reason(ExitStory(kind=kind, code=code, **story), "k")
    return End.of(told, LABELS, cell=cell, seconds=0.4)


def test_an_end_is_news_unless_somebody_asked_for_it() -> None:
    assert not _is_news(end_of(EndKind.ASKED, -9, signal=9, cell="cell"))
    assert not _is_news(end_of(EndKind.EXIT, 0))
    assert _is_news(end_of(EndKind.EXIT, 0, cell="cell"))
    assert _is_news(end_of(EndKind.EXIT, 1))
    assert _is_news(end_of(EndKind.OUTSIDE))
    assert _is_news(end_of(EndKind.SIGNAL, -11, signal=11))
    assert _is_news(end_of(EndKind.COVER_LOST, -9, signal=9))


def test_an_exit_status_is_no_signal_and_a_signal_is_no_exit_status() -> None:
    crashed, ended = end_of(EndKind.SIGNAL, -11, signal=11), end_of(EndKind.EXIT, 3)
    assert (crashed.exit_code, crashed.signal) == (None, 11)
    assert (ended.exit_code, ended.signal) == (3, None)


def test_an_end_is_json_with_the_time_in_utc() -> None:
    end = end_of(EndKind.MEMORY_CAP, -9, "m1", signal=9, memory_limit_bytes=1 << 28)
    told = json.loads(json.dumps(end.as_json()))
    assert told["time"] == "1970-01-01T00:00:00.400+00:00"
    assert (told["kind"], told["memory_limit_bytes"], told["cell"]) == ("memory-cap", 1 << 28, "m1")
    assert told["sentence"].startswith(
        "Kernel k was killed: it reached its memory limit of 256 MiB"
    )


def test_the_page_tells_of_every_field_and_every_kind() -> None:
    text = PAGE.read_text()
    example = json.loads(text.partition("```json\n")[2].partition("```")[0])
    names = [field.name for field in fields(End)]
    assert list(example) == names
    rows = re.findall(r"`([^`]+)`", "".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)))
    assert sorted(rows) == sorted([*names, *EndKind, "kind"])


def test_the_ends_in_a_notebook_come_with_the_numbers_of_their_cells() -> None:
    told = {"output_type": "display_data", "data": {}, "metadata": {MIME: {"kind": "exit"}}}
    crafted = {"output_type": "display_data", "data": {}, "metadata": {MIME: "exit"}}
    cells = [{}, {"outputs": [{"output_type": "stream"}, crafted]}, {"outputs": [told]}]
    assert list(ends_in({"cells": cells})) == [{"kind": "exit", "cell_index": 2}]
