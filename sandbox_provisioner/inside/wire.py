"""inside/wire.py - any process: every word that one of our processes says to another, drawn once.

May import: os. Both sides take the words from here, and what writes and reads them.

Sockets of sequenced packets keep messages apart: one message is one word, and behind a blank what
it is about; descriptors come with it. *launcher* below is also a nursery's child, which is PID 1::

    requests socket, of the stem and of each nursery
      server   ──"fork" + a control socket──▶ stem, nursery    which forks a launcher
      anybody  ──"status"──▶ nursery              it answers with one JSON object, when it is ready
      anybody  ──"retire"──▶ nursery              it ends; its kernels stay

    control socket, of one sandbox
      launcher ──"here" + its pidfd──▶ server     its pid is in the message's credentials
      server   ──"go FAIL_AT" + plan, report pipe, the server's pidfd, stdin, stdout, stderr, and
                 what the plan's `receive` names──▶ launcher; for a spare's claim its PID 1
      launcher ──"opened" + what it opened──▶ server ──"opened" + the same──▶ nursery's child
      PID 1    ──"init" + its pidfd──▶ server     as soon as it is forked; a nursery's child is it
      PID 1    ──"sealed"──▶ server               all sockets listen, their directory is read-only
      PID 1    ──"unsealed TEXT"──▶ server        it could not be made so
      PID 1    ──"memory USED"──▶ server          the kernel was interrupted before its cap
      PID 1    ──"killed COUNT"──▶ server         Linux has ended another process at the cap
      PID 1    ──"full PATH"──▶ server            it can write no more there
      PID 1    ──"covered PATH"──▶ server         a program outside had laid that place bare
      PID 1    ──"made KIND PATH"──▶ server       for that it had to be made
      PID 1    ──"network-lost"──▶ server         whoever dialed for it has ended
      server   ──"say SENTENCE"──▶ PID 1          to the person at the notebook
      server   ──its end──▶ PID 1                 the server is gone, and so is the sandbox

    network channel, of one sandbox; each side keeps its end as long as it lives
      PID 1    ──"listeners NAMES" + a socket for each──▶ gateway    tcp4, tcp6, udp4, udp6
      gateway, server ──"say SENTENCE"──▶ PID 1   to the person at the notebook
      PID 1    ──"netns" + its namespace──▶ server    where the network is a card
      server   ──"up", or "failed TEXT"──▶ PID 1  which waits for it
      gateway  ──its end──▶ PID 1                 there is no network any more
      PID 1    ──its end──▶ gateway, server       the sandbox is gone

    claims socket, of one spare; from the connection on it is the control socket
      server   ──connects──▶ PID 1
      PID 1    ──"hold" + a descriptor──▶ server    where systemd made the groups: it holds them

    report pipe, of one plan (`record`)
      launcher ──"pid" N──▶ server                the host's pid of PID 1
      PID 1    ──"made" KIND PATH──▶ server       a mount point that did not exist before
      any      ──"failed" STEP VERB ERRNO TEXT──▶ server    and whoever failed ends
      any      ──"mistake" STEP VERB TEXT──▶ server         as well; it is one of ours
      kernel   ──its end──▶ server                nobody holds it any more: execve has happened

    control socket of the network gateway
      server   ──"box JSON" + PID 1's channel, the file of counts──▶ gateway    see gateway/main.py
      server   ──"resolver PATH" + that file──▶ gateway    at first, and whenever it is another one
      gateway  ──"ok ID", "ok PATH", "failed TEXT"──▶ server
      server   ──its end──▶ gateway               no more boxes; it ends with its last one

    other pipes and files
      server   ──plan in a memfd──▶ launcher      `encode`, `decode`; nobody can read it in /proc
      kernel   ──"ready"──▶ PID 1 of its spare    it is initialised, and waits to be bound
      PID 1    ──directory, arguments, variables──▶ kernel of its spare    `encode`, `decode`
      PID 1    ──exit file──▶ server              `exit_file`, `read_exit_file`
      server   ──a real-time signal by pidfd──▶ PID 1 ──signal N──▶ kernel's group     `relayed`

FAIL_AT is the verb of the step that a fault injection wants to fail, with ":mistake" behind it as
a mistake of ours does, "" for none. STEP is the number of the
step that failed, as `explain` counts them; 0 is before the first.
"""

from __future__ import annotations

import os

# On a requests socket.
FORK = "fork"
STATUS = "status"
RETIRE = "retire"
# On a control socket.
HERE = "here"
GO = "go"
OPENED = "opened"
INIT = "init"
SEALED = "sealed"
UNSEALED = "unsealed"
MEMORY = "memory"
KILLED = "killed"
FULL = "full"
COVERED = "covered"
SAY = "say"
CAP = "cap"  # BYTES, and two sentences in_hexadecimal: the cap on memory is another one now
MADE = "made"  # in a report as well
HOLD = "hold"
NETWORK_LOST = "network-lost"
# On a network channel, which PID 1 is given by this name; SAY is one, too, and FAILED.
NETWORK = "network"
# The lock of what it lays aside, which it holds and never looks at.
REVIEW = "review-lock"
# The same of what is kept of what it installs.
LAYER = "layer-lock"
# The same of the folder that it writes to.
DISK = "disk-lock"
# A pidfd of what reads an image file for an ordinary user.
IMAGE_SERVER = "image-server"
LISTENERS = "listeners"
# From the kernel to PID 1, with what its system call filter has judged there.
FILTERS = "filters"
NETNS = "netns"
UP = "up"
# In a report.
PID = "pid"
FAILED = "failed"
MISTAKE = "mistake"
# On the gateway's control socket; its "failed" is that of a report.
BOX = "box"
RESOLVER = "resolver"
OK = "ok"
# On a pipe between a spare's kernel and its PID 1.
READY = "ready"
# In an exit file: why PID 1 ended the kernel, or what it knows of the end. With some comes more.
MEMORY_CAP = "memory-cap"  # Linux has ended it for want of memory
INTERRUPTED = "interrupted"  # it ended just after the interrupt near its memory cap
SHM_FULL = "shm-full"  # and the size of the folder in bytes
TMP_FULL = "tmp-full"
DISK_FULL = "disk-full"  # and the size of what disk_limit limits
WORKDIR_FULL = "workdir-full"  # and the size of what workdir_limit limits
COVER_LOST = "cover-lost"  # and the path, `in_hexadecimal`
SOCKETS_MISUSED = "sockets-misused"  # something else was put beside the sockets
GROUP_LOST = "group-lost"
SERVER_ENDED = "server-ended"  # and the kernel with it
INTERNAL_ERROR = "internal-error"  # PID 1 has a mistake in it; and the text, `in_hexadecimal`

# What the C library reads before it looks up a name; the gateway's paths lead to these descriptors
# of its own.
RESOLVER_FILES = {
    "/etc/hosts": 10,
    "/etc/nsswitch.conf": 11,
    "/etc/host.conf": 12,
    "/etc/resolv.conf": 13,
}

# The variable of the server's environment that holds FAIL_AT.
FAIL_AT = "SANDBOX_FAIL_AT"
# The exit status of who could not do its part.
FAILED_STATUS = 125
# The signals that PID 1 hands on begin with glibc's SIGRTMIN: 32 and 33 are glibc's own.
_FIRST_RELAYED = 34
_SIGNALS = range(1, 32)

# Of one message that is read whole.
LONGEST = 4096
_END_OF_RECORD = b"\0\n"  # a path may have ends of lines in it, and no NUL


def message(word: str, *rest: str) -> bytes:
    """One message of a socket: *word*, and what it is about."""
    return os.fsencode(" ".join((word, *rest)))


def parts(text: bytes) -> tuple[str, str]:
    """A message's word, and the rest of it."""
    word, _, rest = os.fsdecode(text).partition(" ")
    return word, rest


def record(*words: str) -> bytes:
    """One record of a report."""
    return b"\0".join(os.fsencode(word) for word in words) + _END_OF_RECORD


def records(text: bytes) -> tuple[list[list[str]], bytes]:
    """The records that are whole in *text*, and the beginning of the next one."""
    *whole, rest = text.split(_END_OF_RECORD)
    return [[os.fsdecode(word) for word in one.split(b"\0")] for one in whole], rest


def encode(lists: list[list[bytes]]) -> bytes:
    """Lists of words, a plan above all: for each list a count and "#", then "LENGTH:BYTES" a
    word."""
    return b"".join(
        b"%d#%s" % (len(words), b"".join(b"%d:%s" % (len(word), word) for word in words))
        for words in lists
    )


def decode(text: bytes) -> list[list[bytes]]:
    """What `encode` has written."""
    position = 0

    def number(end: bytes) -> int:
        nonlocal position
        stop = text.index(end, position)
        value = int(text[position:stop])
        position = stop + 1
        return value

    lists = []
    while position < len(text):
        words = []
        for _ in range(number(b"#")):
            length = number(b":")
            words.append(text[position : position + length])
            position += length
        lists.append(words)
    return lists


def exit_file(code: int, signal: int, why: str, tail: bytes) -> bytes:
    """How a kernel ended: "CODE SIGNAL [WHY [MORE]]", a newline, and the last of its stderr."""
    return os.fsencode(f"{code} {signal} {why}\n") + tail


def read_exit_file(content: bytes) -> tuple[int | None, int, str, str, bytes]:
    """Code, signal, why, more of that, and the last of stderr.

    The code is None where *content* is no exit file: PID 1 could write nothing, or somebody else
    has written to it.
    """
    head, _, tail = content.partition(b"\n")
    words = head.split()
    known = len(words) >= 2 and all(word.isdigit() and len(word) < 4 for word in words[:2])
    code, signal = (int(words[0]), int(words[1])) if known else (None, 0)
    why, more = [*map(os.fsdecode, words[2:4]), "", ""][:2]
    return code, signal, why, more, tail


def in_hexadecimal(text: str) -> str:
    """*text*, a path perhaps, as a word without blanks."""
    return os.fsencode(text).hex()


def from_hexadecimal(word: str) -> str:
    """What `in_hexadecimal` has written; "" if *word* is none."""
    try:
        return os.fsdecode(bytes.fromhex(word))
    except ValueError:
        return ""


def relayed(number: int) -> int:
    """The signal that stands for signal *number* to the kernel's group."""
    return _FIRST_RELAYED + number - 1


# By the signal that PID 1 gets, the one that the kernel's group gets.
RELAYED = {relayed(number): number for number in _SIGNALS}


def fail_as_wished(fail_at: str, step: str) -> None:
    """Fault injection: raise what a failing *step* raises, if it is the one."""
    wished, _, kind = fail_at.partition(":")
    if step == wished:
        text = f"made to fail by {FAIL_AT}"
        raise AssertionError(text) if kind == MISTAKE else OSError(5, text)
