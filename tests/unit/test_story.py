"""How a kernel ended is one kind of a list, and what the sandbox did has a sentence."""

from __future__ import annotations

import pytest

from sandbox_provisioner.story import ExitFile, ExitStory, with_reason
from sandbox_provisioner.told import EndKind

# Of these whoever did it knows why.
UNTOLD = {EndKind.ASKED, EndKind.EXIT}


@pytest.mark.parametrize(
    ("content", "code", "signal", "kind"),
    [
        (b"0 0 \n", 0, 0, EndKind.EXIT),
        (b"3 0 \nlast words", 3, 0, EndKind.EXIT),
        (b"0 11 \n", 0, 11, EndKind.SIGNAL),
        (b"0 0 interrupted\n", 0, 0, EndKind.INTERRUPTED),
        (b"125 0 sockets-misused\n", 125, 0, EndKind.SOCKETS_MISUSED),
        (b"125 0 group-lost\n", 125, 0, EndKind.GROUP_LOST),
        (b"0 7 shm-full 67108864\n", 0, 7, EndKind.SHM_FULL),
        (b"0 7 tmp-full 4096\n", 0, 7, EndKind.TMP_FULL),
        (b"125 0 made-up\n", 125, 0, EndKind.EXIT),
        (b"", None, 0, EndKind.OUTSIDE),
        (b"x y z\n", None, 0, EndKind.OUTSIDE),
        (b"1234 0\n", None, 0, EndKind.OUTSIDE),
    ],
)
def test_what_pid_1_has_left_is_read(content, code, signal, kind):
    told = ExitFile.of(content)
    assert (told.code, told.signal, told.kind) == (code, signal, kind)


def test_the_file_that_was_replaced_is_told_by_its_path():
    told = ExitFile.of(b"125 0 cover-lost " + b".bashrc".hex().encode() + b"\nwords")
    assert (told.kind, told.text, told.tail) == (EndKind.COVER_LOST, ".bashrc", b"words")
    assert ExitFile.of(b"125 0 cover-lost zz\n").text == ""


def test_a_folder_that_was_full_is_told_with_its_size_and_the_option_that_raises_it():
    told = ExitFile.of(b"0 7 shm-full 67108864\n")
    story = ExitStory(kind=told.kind, code=-7, full_bytes=told.number)
    reason = with_reason(story, "0123abcd").reason
    assert "/dev/shm" in reason
    assert "64 MiB" in reason
    assert "shm_limit" in reason
    assert ExitFile.of(b"0 7 shm-full x\n").number == 0


@pytest.mark.parametrize("kind", EndKind)
def test_what_nobody_in_the_kernel_did_has_a_sentence_and_nothing_else_has(kind):
    story = ExitStory(
        kind=kind,
        code=None,
        memory_limit_bytes=1 << 30,
        full_above="the group /a",
        lost_path="f",
        mistake="m",
    )
    told = with_reason(story, "0123abcd")
    assert told.reason.startswith("Kernel 0123abcd ") is (kind not in UNTOLD)
    assert told.kind is kind


@pytest.mark.parametrize(
    ("number", "part"),
    [
        (9, "killed by SIGKILL: by one of its own processes, by a person or a program outside"),
        (11, "ended by signal 11 (SIGSEGV): its program or a library has failed, or somebody"),
        (40, "ended by signal 40: "),
    ],
)
def test_of_a_signal_nobody_is_accused(number, part):
    story = ExitStory(kind=EndKind.SIGNAL, code=-number, signal=number)
    reason = with_reason(story, "0123abcd").reason
    assert part in reason
    assert "limit" not in reason


@pytest.mark.parametrize("kind", [EndKind.SIGNAL, EndKind.OUTSIDE])
def test_memory_that_was_full_around_it_is_no_more_than_a_guess(kind):
    story = ExitStory(kind=kind, code=-9, signal=9, full_above="the machine's memory")
    assert with_reason(story, "0123abcd").reason.endswith(
        " It may have been for want of memory: the machine's memory was full at that time."
    )


def test_where_a_limit_above_was_met_as_well_its_own_is_not_the_only_one_that_is_told():
    story = ExitStory(
        kind=EndKind.MEMORY_CAP,
        code=-9,
        signal=9,
        memory_limit_bytes=1 << 30,
        full_above="the group /a, with a memory limit of 2 GiB,",
    )
    reason = with_reason(story, "0123abcd").reason
    assert "it reached its memory limit of 1 GiB" in reason
    assert "the group /a, with a memory limit of 2 GiB, was full, too" in reason
