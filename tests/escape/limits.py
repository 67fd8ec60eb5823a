"""limits.py - inside: how much of what the machine has a fixed number of one kernel can take."""

from __future__ import annotations

import os

from frame import Kind, attempt
from tools import call, resource, signal

SHARED = "what the machine has a fixed number of"


_NOBODYS_ID = 0x6FFF0000  # of nobody, and of no kernel

for number, title, name, most, answer in (
    (450, "take all watchers of files", "inotify", 4096, "EMFILE"),
    (451, "take all terminals", "terminal", 4096, "ENOSPC"),
    (452, "have signals wait without end", "signal", 100_000, "EAGAIN"),
    (453, "make queues without end", "queue", 4096, "EMFILE"),
    (454, "make memory segments without end", "segment", 8192, "ENOSPC"),
):

    @attempt(
        number, title, Kind.LIMITS, SHARED, name, most, _NOBODYS_ID,
        expect=answer, landlock=None, control="it was not stopped",
    )  # fmt: skip
    def take_all(host, name, most, nobodys_id):
        """Without the box only so many that the machine keeps some, as somebody for whom Linux has
        counted nothing: of what root may have, others of this machine may have taken any part."""
        if not host.boxed:
            most = 2
            os.setresuid(nobodys_id, nobodys_id, nobodys_id)
        signal.pthread_sigmask(signal.SIG_BLOCK, {40})
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(65536, resource.getrlimit(7)[1]),) * 2)
        acts = {
            "inotify": lambda n: call("inotify_init1", 0),
            "terminal": lambda n: os.openpty(),
            "signal": lambda n: call("rt_sigqueueinfo", os.getpid(), 40, bytes(8) + b"\xff" * 120),
            "queue": lambda n: call("mq_open", b"q%d" % n, os.O_CREAT | os.O_RDWR, 0o600, None),
            "segment": lambda n: call("shmget", 0, 4096, 0o1600),
        }
        made = [acts[name](count) for count in range(most)]
        for n in range(most) if name == "queue" else ():
            call("mq_unlink", b"q%d" % n)
        for segment in made if name == "segment" else ():
            call("shmctl", segment, 0, None)
        return "it was not stopped"


@attempt(
    457, "open descriptors without end", Kind.LIMITS, "RLIMIT_NOFILE",
    expect="refused", control="raised",
)  # fmt: skip
def open_without_end(host):
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 20,) * 2 if host.boxed else (99,) * 2)
    except ValueError:
        return "refused"
    return "raised"


for number, folder, option in ((458, "/tmp", "tmp_limit"), (459, "/dev/shm", "shm_limit")):

    @attempt(
        number, f"fill {folder}", Kind.LIMITS, option, folder,
        expect="ENOSPC", landlock=None, control="filled",
        alone=True, options={option: "8M"},
    )  # fmt: skip
    def fill(host, folder):
        """Without the box a little of it."""
        with open(f"{folder}/sbx-{os.getpid()}", "wb") as file:
            for _ in range(16 if host.boxed else 1):
                file.write(bytes(1 << 20))
                file.flush()
        os.unlink(file.name)
        return "filled"


@attempt(
    461, "write more than the disk limit allows, where nothing of it has a name", Kind.LIMITS,
    "disk_limit", expect="ENOSPC", landlock=None, control="written",
    alone=True, options={"disk_limit": "8M"},
)  # fmt: skip
def write_without_names(host):
    """Without the box a little of it."""
    kept = []
    for _ in range(16 if host.boxed else 1):
        kept.append(os.open("/tmp", os.O_RDWR | os.O_TMPFILE))
        for place in (0, 1 << 30):
            os.pwrite(kept[-1], bytes(1 << 19), place)
    for fd in kept:
        os.close(fd)
    return "written"


@attempt(
    460, "start processes without end", Kind.LIMITS, "a fork bomb",
    expect="EAGAIN", user=None, landlock=None, control="started",
    alone=True, options={"pids_limit": 64},
)  # fmt: skip
def fork_without_end(host):
    pids = []
    try:
        for _ in range(128 if host.boxed else 2):
            pids.append(os.fork())
            if pids[-1] == 0:
                os.closerange(0, 256)  # who waits for our answer waits for the end of a pipe
                signal.pause()
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    return "started"
