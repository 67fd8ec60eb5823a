"""app/listing.py - a command of its own: draws what `jupyter sandbox list` shows, with rich.

Names and paths are a kernel's, or its user's: nothing of them reaches a terminal but as a letter
(`one_line`), and nothing of them is markup. What is no terminal gets whole lines without colours.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sandbox_provisioner.app.running import Sandbox
from sandbox_provisioner.confinement import confiner
from sandbox_provisioner.handle import short_id
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.records import age_seconds
from sandbox_provisioner.units import format_bytes

NOTHING = "No sandbox runs."
_PIPE_COLUMNS = 1 << 14
_BAR_COLUMNS = 10
# Below this many columns of a terminal, what people need least is left out.
_NARROW, _NARROWER = 130, 100
_COLOURS = {"busy": "yellow", "idle": "green", "asleep": "blue", "left": "red", "ended": "red"}
_HIGH, _FULL = 0.75, 0.92

Cell = Callable[[Sandbox], Text]


@dataclass(frozen=True, slots=True)
class Column:
    """*cell* draws it; *wanted* is whether it tells anything of these sandboxes, at this width."""

    name: str
    cell: Cell
    wanted: Callable[[Sequence[Sandbox], int], bool] = lambda found, width: True
    numbers: bool = False
    gives_way: bool = False


def _plain(tell: Callable[[Sandbox], str]) -> Cell:
    return lambda sandbox: Text(one_line(tell(sandbox)))


def _place(sandbox: Sandbox) -> Text:
    """The notebook, or the work directory: the name first, since the end is what is cut off."""
    record = sandbox.record
    path = record.notebook if record.notebook.startswith("/") else record.shown_at or record.workdir
    folder, _, name = one_line(path).rpartition("/")
    home = os.path.expanduser("~")
    if folder == home or folder.startswith(f"{home}/"):
        folder = f"~{folder[len(home) :]}"
    return Text.assemble(name, (f"  {folder or '/'}", "dim")) if name else Text("")


def _state(sandbox: Sandbox) -> Text:
    return Text(sandbox.state, style=_COLOURS.get(sandbox.state, ""))


def _memory(sandbox: Sandbox, *, brief: bool = False) -> Text:
    """A bar of the limit, if there is one, and the figures; *brief* is without the limit's."""
    used, limit = sandbox.usage.memory_bytes, sandbox.record.memory_limit_bytes
    if used is None:
        return Text("?")
    if not limit:
        return Text.assemble(" " * (_BAR_COLUMNS + 1), format_bytes(used))
    share = min(1.0, used / limit)
    full = round(share * _BAR_COLUMNS)
    colour = "red" if share >= _FULL else "yellow" if share >= _HIGH else "green"
    bar = ("━" * full, colour), ("─" * (_BAR_COLUMNS - full), "dim")
    of_limit = "" if brief else f" of {format_bytes(limit)}"
    return Text.assemble(*bar, f" {format_bytes(used)}{of_limit}")


def _cpu(sandbox: Sandbox) -> Text:
    percent = sandbox.cpu_percent
    return Text("?" if percent is None else f"{percent:.0f} %")


def _shares(found: Sequence[Sandbox], _: int) -> bool:
    return any(sandbox.record.kind != "kernel" or sandbox.record.nursery for sandbox in found)


def _is_weaker(found: Sequence[Sandbox], _: int) -> bool:
    return any(confiner(sandbox.record.confinement).must_be_shown for sandbox in found)


def _bytes(tell: Callable[[Sandbox], int | None]) -> Cell:
    def cell(sandbox: Sandbox) -> Text:
        count = tell(sandbox)
        return Text("?" if count is None else format_bytes(count))

    return cell


def _disk(sandbox: Sandbox) -> Text:
    disk = sandbox.disk
    if disk is None:
        return Text("")
    return Text(f"{format_bytes(disk.used_bytes)} of {format_bytes(disk.size_bytes)}")


def _has_disk(found: Sequence[Sandbox], width: int) -> bool:
    return width >= _NARROW and any(sandbox.disk for sandbox in found)


def _has_network(found: Sequence[Sandbox], _: int) -> bool:
    return any(sandbox.traffic for sandbox in found)


def _traffic(field: str) -> Cell:
    def cell(sandbox: Sandbox) -> Text:
        return Text(format_bytes(getattr(sandbox.traffic, field)) if sandbox.traffic else "")

    return cell


COLUMNS = (
    Column("id", _plain(lambda s: short_id(s.record)), lambda _, width: width >= _NARROWER),
    Column("kind", _plain(lambda s: s.record.kind), _shares),
    Column("name", _plain(lambda s: s.record.name), gives_way=True),
    Column("notebook", _place, gives_way=True),
    Column("user", _plain(lambda s: s.record.user), lambda _, width: width >= _NARROW),
    Column("age", _plain(lambda s: format_age(age_seconds(s.record))), numbers=True),
    Column("state", _state),
    Column("memory", _memory, lambda _, width: width >= _NARROWER),
    Column("memory", partial(_memory, brief=True), lambda _, width: width < _NARROWER),
    Column(
        "private",
        _bytes(lambda s: s.pages.private_bytes if s.pages else None),
        lambda found, width: _shares(found, width) and width >= _NARROW,
        numbers=True,
    ),
    Column(
        "shared",
        _bytes(lambda s: s.pages.shared_bytes if s.pages else None),
        lambda found, width: _shares(found, width) and width >= _NARROW,
        numbers=True,
    ),
    Column("held by", _plain(lambda s: s.record.confinement), _is_weaker),
    Column("cpu", _cpu, numbers=True),
    *(
        Column(name, _traffic(field), _has_network, numbers=True)
        for name, field in (("down", "down_bytes"), ("up", "up_bytes"))
    ),
    Column(
        "refused",
        _plain(lambda s: str(s.traffic.refusals) if s.traffic else ""),
        lambda found, width: _has_network(found, width) and width >= _NARROWER,
        numbers=True,
    ),
    Column("disk", _disk, _has_disk, numbers=True),
    Column("processes", _plain(lambda s: str(s.usage.processes or "?")), numbers=True),
)


def format_age(seconds: float) -> str:
    """Two units are enough: 59 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if not minutes:
        return f"{seconds:.0f} s"
    if not hours:
        return f"{minutes} min"
    return f"{days} d {hours % 24} h" if days else f"{hours} h {minutes % 60} min"


def drawn(found: Sequence[Sandbox], width: int) -> Table | Text:
    """The table of *found*, which are in the order to show, for *width* columns."""
    if not found:
        return Text(NOTHING)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    columns = [column for column in COLUMNS if column.wanted(found, width)]
    for column in columns:
        # A column that may wrap is made narrower first; its cells are cut off in place of that.
        no_wrap, justify = not column.gives_way, "right" if column.numbers else "left"
        table.add_column(column.name, no_wrap=no_wrap, justify=justify)  # type: ignore[arg-type]
    for sandbox in found:
        table.add_row(*(_on_one_line(column.cell(sandbox)) for column in columns))
    return table


def _on_one_line(cell: Text) -> Text:
    cell.no_wrap, cell.overflow = True, "ellipsis"
    return cell


def console() -> Console:
    """Of our stdout; in a pipe each line is as long as it has to be."""
    is_terminal = sys.stdout.isatty()
    return Console(
        file=sys.stdout,
        force_terminal=is_terminal,
        width=None if is_terminal else _PIPE_COLUMNS,
        markup=False,
        highlight=False,
        emoji=False,
    )


@contextlib.contextmanager
def screen(out: Console) -> Iterator[Callable[[Sequence[Sandbox], str], None]]:
    """A function that shows *found* below a title: on a terminal each time in the place of what it
    has shown before, on the other screen, until that is left; Ctrl-C and SIGTERM leave it."""
    if not out.is_terminal or out.is_dumb_terminal:
        yield lambda found, _: out.print(drawn(found, out.width))
        return
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        with Live(console=out, screen=True, auto_refresh=False) as live:
            yield lambda found, title: live.update(
                Group(Text(title, style="dim"), Text(), drawn(found, out.width)), refresh=True
            )
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)
