"""warmth.py - in the test process: what tests of nurseries and of spares have in common."""

from __future__ import annotations

import json
import os
import re
import select
from pathlib import Path
from typing import Any

from sandbox_provisioner.records import Record, all_records, open_init
from sandbox_provisioner.warm import ahead
from sandbox_provisioner.warm.found import SOCKET, call

# What a cell can see of its process; a cold kernel's is the measure.
STATE = """
import asyncio, faulthandler, gc, json, locale, logging, multiprocessing, os, resource, signal, sys
import threading, time, warnings
def handler(number):
    try:
        return str(getattr(signal.getsignal(number), "__qualname__", signal.getsignal(number)))
    except ValueError:
        return "?"
names = [n for n in dir(resource) if n.startswith("RLIMIT")]
limits = {n: resource.getrlimit(getattr(resource, n)) for n in names}
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "argv": sys.argv, "executable": sys.executable,
    "orig_argv_program": sys.orig_argv[0], "path": sys.path,
    "main": sorted(n for n in vars(sys.modules["__main__"]) if n.startswith("__")),
    "file": getattr(sys.modules["__main__"], "__file__", None), "name": __name__,
    "signals": {n: handler(n) for n in range(1, 32)}, "blocked": status["SigBlk"].strip(),
    "ignored": status["SigIgn"].strip(), "groups": status["Groups"].split(),
    "capabilities": [status[n].strip() for n in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "new_privileges": status["NoNewPrivs"].strip(), "seccomp": status["Seccomp"].strip(),
    "dumpable_owner": os.stat("/proc/self/environ").st_uid == os.getuid(),
    "faulthandler": faulthandler.is_enabled(), "threads": sorted(
        type(t).__name__ for t in threading.enumerate()),
    "gc": [gc.isenabled(), gc.get_threshold()], "flags": list(sys.flags),
    "environment": " ".join(sorted(os.environ)), "home": os.environ["HOME"],
    "cwd": os.getcwd(), "umask": os.umask(0o022), "pid": os.getpid(), "parent": os.getppid(),
    "multiprocessing": [multiprocessing.get_start_method(), multiprocessing.current_process().name],
    "policy": type(asyncio.get_event_loop_policy()).__name__,
    "loop": asyncio.get_event_loop().is_running(),
    "locale": locale.setlocale(locale.LC_ALL), "zone": time.tzname,
    "handlers": [type(h).__name__ for h in logging.getLogger().handlers],
    "limits": limits, "recursion": sys.getrecursionlimit(),
    "stdin": [sys.stdin.name if sys.stdin else None], "unraisable": sys.unraisablehook.__name__,
    "ours": sorted(n for n in sys.modules if n.startswith("sandbox_provisioner")),
    "listed": sorted(p for p in getattr(get_ipython().kernel, "_kernel_modules", ())
        if "/sandbox_provisioner/" in p),
    "oom": open("/proc/self/oom_score_adj").read().strip(),
    "hostname": os.uname().nodename, "users": [os.getresuid(), os.getresgid()],
    "session": os.getsid(0) == os.getpid(), "history": [*get_ipython().history_manager.get_range()],
    "number": get_ipython().execution_count, "excepthook": sys.excepthook.__name__,
    "filters": [str(f) for f in warnings.filters],
    "shell": [type(c).__name__ for c in get_ipython().configurables],
    "owners": [type(get_ipython().parent).__name__, get_ipython().kernel is get_ipython().parent],
    "config": str(get_ipython().config), "starting": get_ipython().starting_dir,
    "profile": [get_ipython().profile_dir.location, get_ipython().ipython_dir],
    "directories": [str(path) for path in _dh],
    "names": sorted(n for n in get_ipython().user_ns if n != "json"),
    "hidden": sorted(get_ipython().user_ns_hidden),
    "traced": str(get_ipython().history_manager.hist_file),
    "connection": sorted(json.load(open(get_ipython().kernel.parent.connection_file)).items()),
    "session_name": get_ipython().user_ns.get("__session__"),
    "mounts": sorted((w[4], w[5], w[w.index("-") + 1], w[-1]) for w in (
        line.split() for line in open("/proc/self/mountinfo"))),
    "files": sorted(os.listdir("/") + os.listdir("/run") + os.listdir("/run/jupyter")),
}))
"""
RANDOM = """
import json, multiprocessing, os, random, secrets, tempfile, uuid
values = [random.random(), str(uuid.uuid1()), str(uuid.uuid4()), os.urandom(8).hex(),
    next(tempfile._get_candidate_names()), secrets.token_hex(8),
    multiprocessing.current_process().authkey.hex(), get_ipython().kernel.ident]
try:
    import numpy
    values += [float(numpy.random.rand()), float(numpy.random.default_rng().random())]
except ImportError:
    pass
print(json.dumps(values))
"""


def made(runtime_dir: Path) -> Record:
    """Wait for the nursery that is being made in the background."""
    ahead.wait()
    (record,) = nurseries(runtime_dir)
    return record


def spares(runtime_dir: Path) -> list[Record]:
    return [record for _, record in all_records(runtime_dir) if record.kind == "spare"]


def state_of(k: Any) -> dict[str, Any]:
    """`STATE` of a kernel, without what is each kernel's own."""
    # A range of ids begins with any number; all of them have ten digits.
    found: dict[str, Any] = json.loads(re.sub(r"([ug]id=)1\d{9}", r"\1…", k.run(STATE)))
    own = os.path.basename(k.manager.connection_file)
    assert found["argv"].pop().endswith(own)
    found["files"].remove(own)
    found["config"] = found["config"].replace(own, "")
    found["connection"] = [[n, v] for n, v in found["connection"] if n != "key"]
    return found


def nurseries(runtime_dir: Path) -> list[Record]:
    return [record for _, record in all_records(runtime_dir) if record.kind == "nursery"]


def came_from(k: Any) -> str:
    """The id of the nursery that the kernel of *k* was forked from, "" of a cold one."""
    return str(k.provisioner.handle.record.nursery)


def wait_for_end(record: Record) -> None:
    pidfd = open_init(record)
    if pidfd is not None:
        assert select.select([pidfd], [], [], 30)[0]
        os.close(pidfd)


def status_of(nursery: Record, runtime_dir: Path) -> Any:
    channel = call(runtime_dir / nursery.sandbox_id / SOCKET)
    assert channel
    with channel:
        channel.send(b"status")
        return json.loads(channel.recv(1 << 16))


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
