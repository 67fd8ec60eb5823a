"""io.py - any process outside; pure: the most traffic of the disk with the work directory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from traitlets import Integer, Unicode, Union

from sandbox_provisioner.facilities.caps.wish.cap import Cap, Options, Property, Write
from sandbox_provisioner.units import at_least, format_bytes, parse_bytes

_SMALLEST_BYTES = 64 << 10


class IoOptions(Options):
    """What users write."""

    io_limit = Union(
        [Integer(), Unicode()],
        allow_none=True,
        default_value=None,
        help="The most bytes a second that a kernel may read from the disk of its work directory, "
        'and the most that it may write to it: "50M".',
    ).tag(
        config=True,
        flag="io-limit",
        fields=("limits.io_bytes_per_second",),
        readme="The most bytes a second read from, and as many written to, the disk of the work "
        'directory: `"50M"`; with cgroup v1 only what does not go through the page cache is '
        "counted.",
    )


@dataclass(frozen=True, kw_only=True)
class IoWish:
    """*io_bytes_per_second* holds for reading and for writing, each."""

    io_bytes_per_second: int | None = None


class Io(Cap):
    """The cap on disk traffic."""

    facility = controller = "io"
    v1_controller = "blkio"
    options = ("io_limit",)
    fields = ("io_bytes_per_second",)
    noun = "disk traffic"
    needs_disk = True
    remedy = (
        "Work in a directory on a disk (not on overlay, btrfs, zfs, tmpfs or a file server), or "
        "remove io_limit.",
    )

    def wish(self, options: IoOptions) -> IoWish:
        limit = options.io_limit
        return IoWish(io_bytes_per_second=None if limit is None else parse_bytes("io_limit", limit))

    def check(self, limits: IoWish) -> None:
        at_least("io_limit", limits.io_bytes_per_second, _SMALLEST_BYTES, "Use at least 64K.")

    def describe(self, limits: IoWish) -> str:
        return f"cap disk traffic at {format_bytes(limits.io_bytes_per_second or 0)} a second"

    def v1(self, limits: IoWish, disk: str) -> Iterator[Write]:
        """blkio-controller.rst: v1 sees what goes to the disk at once, so reading, and writing with
        O_DIRECT or O_SYNC; what the page cache writes later it does not know whose it is."""
        if limits.io_bytes_per_second is not None:
            text = f"{disk} {limits.io_bytes_per_second}"
            for which in ("read", "write"):
                yield Write(f"blkio.throttle.{which}_bps_device", text, same=_is_a_line_of)

    def v2(self, limits: IoWish, disk: str) -> Iterator[Write]:
        if limits.io_bytes_per_second is not None:
            each = limits.io_bytes_per_second
            yield Write("io.max", f"{disk} rbps={each} wbps={each}", same=_begins_a_line)

    def properties(self, limits: IoWish, disk: str) -> Iterator[Property]:
        if limits.io_bytes_per_second is not None:
            for which in ("IOReadBandwidthMax", "IOWriteBandwidthMax"):
                yield which, ("a(st)", [(f"/dev/block/{disk}", limits.io_bytes_per_second)])

    def why_not(self, disk: str) -> str:
        return "" if disk else "the work directory lies on no disk of this machine"


def _is_a_line_of(written: str, back: str) -> bool:
    """Whether a file with a line a device has ours."""
    return written in back.splitlines()


def _begins_a_line(written: str, back: str) -> bool:
    """io.max tells limits on operations behind those on bytes."""
    return any(line.startswith(f"{written} ") for line in back.splitlines())
