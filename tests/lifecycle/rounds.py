"""rounds.py - in the test process: kills or stops somebody at a random moment of a start, and looks
whether kernels start as before, whether anything is left, and whether a stranger was hit.

A round is made of a seed. Whoever is killed, his process id is given to a stranger at once, where
we may choose one (clone3 with set_tid, as root).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from leaks import Watch

from benchmarks.common import Process, descendants, process, wait_until
from sandbox_provisioner.records import Record, all_records, open_init
from sandbox_provisioner.sweeping import sweep

ROLES = ("server", "stem", "launcher", "init", "kernel", "nursery", "spare")
KINDS = ("cold", "nursery", "spare")
# A start may wait for somebody who does not answer; and this machine may be busy.
ANSWER_SECONDS = 100
_LATEST_SECONDS = 0.6
_GONE_SECONDS = 60
_STEM = b"launcher.enter"

STRANGER = """
import ctypes, errno, os, select, signal, sys
libc = ctypes.PyDLL(None, use_errno=True)
wish = (ctypes.c_int * 1)(int(sys.argv[1]))
words = (ctypes.c_uint64 * 11)(0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(wish), 1, 0)
for _ in range(100):
    made = libc.syscall(435, words, ctypes.c_size_t(88))
    if made == 0:
        while True:
            signal.pause()
    if made > 0 or ctypes.get_errno() != errno.EEXIST:
        break
    select.poll().poll(10)  # until whoever had it is waited for
print(made, flush=True)
sys.stdin.read()
if made > 0:
    print("alive" if os.waitpid(made, os.WNOHANG) == (0, 0) else "hit", flush=True)
    os.kill(made, signal.SIGKILL)
"""


Say = Callable[[str], None]


class Failed(AssertionError):
    """What a round found wrong."""


@dataclass
class Place:
    """The folders of a run, and what was seen in it."""

    root: Path
    runtime: Path
    watch: Watch
    seen: set[Process] = field(default_factory=set)

    @classmethod
    def make(cls, watch: Watch) -> Place:
        """New ones, which `watch` removes."""
        root = Path(tempfile.mkdtemp(prefix="sbx-", dir="/tmp"))
        runtime = Path(tempfile.mkdtemp(prefix="sbx-", dir=_short_place()))
        watch.temporary += [root, runtime]
        for name in ("work", "run", "ipython"):
            (root / name).mkdir()
        config: dict[str, object] = {"runtime_dir": str(runtime)}
        warm = config | {"warm": True, "warm_idle_timeout": 300}
        for kind, options in (("cold", config), ("nursery", warm), ("spare", warm | {"spares": 1})):
            _write_kernelspec(root / "data/kernels" / kind, options)
        return cls(root, runtime, watch)

    def environment(self) -> dict[str, str]:
        """Of a server: our modules, and nothing of the person's own Jupyter."""
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "JUPYTER_PATH": str(self.root / "data"),
            "JUPYTER_RUNTIME_DIR": str(self.root / "run"),
            "IPYTHONDIR": str(self.root / "ipython"),
        }

    def note(self, server: int) -> list[Record]:
        """Remember what there is now; the records."""
        self.seen |= descendants(server)
        found = [record for _, record in all_records(self.runtime)]
        for record in found:
            self.watch.expect_gone(record, self.runtime)
            if record.init_pid:
                self.seen |= descendants(record.init_pid) | {process(record.init_pid)}
        return found


def _short_place() -> str:
    places = ("/run", os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp")
    return next(place for place in places if place and os.access(place, os.W_OK))


def _write_kernelspec(folder: Path, config: dict[str, object]) -> None:
    folder.mkdir(parents=True)
    stanza = {"provisioner_name": "sandbox-provisioner", "config": {"warm": False, **config}}
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": folder.name, "language": "python"}
    spec["metadata"] = {"kernel_provisioner": stanza}
    (folder / "kernel.json").write_text(json.dumps(spec))


class Server:
    """A process that runs serving.py."""

    def __init__(self, place: Place) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("serving.py"))],
            env=place.environment(),
            cwd=place.root / "work",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.pid = self._process.pid

    def say(self, word: str) -> None:
        """Ask for something."""
        assert self._process.stdin
        self._process.stdin.write(f"{word}\n".encode())
        self._process.stdin.flush()

    def hear(self) -> str:
        """The answer; "dead" if there is no server to give one."""
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], ANSWER_SECONDS)[0]:
            raise Failed(f"the server has not answered for {ANSWER_SECONDS} s")
        line = self._process.stdout.readline()
        return str(json.loads(line)) if line else "dead"

    def ask(self, word: str) -> str:
        """`say`, and `hear`."""
        self.say(word)
        return self.hear()

    def close(self) -> None:
        """Let it end in order, if it lives."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise Failed("the server does not end") from None
        finally:
            self._process.stdout.close()


# -- who is there


def roles(server: int, records: list[Record]) -> dict[str, list[int]]:
    """The process ids of those who have a role now."""
    inits = {record.init_pid: record.kind for record in records if record.init_pid}
    made = [pid for pid in _children(server) if pid not in inits and _STEM in _command(pid)]
    made.sort(key=lambda pid: int(process(pid).start or 0))
    found = {"server": [server], "stem": made[:1], "launcher": made[1:]}
    for kind, role in (("kernel", "init"), ("nursery", "nursery"), ("spare", "spare")):
        found[role] = [pid for pid, its in inits.items() if its == kind]
    found["kernel"] = [child for pid in found["init"] for child in _children(pid)]
    # Of a nursery not its init, but the process that forks.
    found["nursery"] = [child for pid in found["nursery"] for child in _children(pid)]
    return found


def _children(pid: int) -> list[int]:
    """Those of all its threads: who spawns a stem is not the main one."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, file.read_text().split())
    return found


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# -- a round


@dataclass(frozen=True)
class Round:
    """What a seed makes: which start is disturbed, when, and who is hit how."""

    kind: str
    role: str
    seconds: float
    signal: int

    @classmethod
    def of(cls, chance: random.Random, number: int) -> Round:
        """Launchers live for some 20 ms only."""
        first = ROLES.index("server") + (number == signal.SIGSTOP)  # who could not answer
        role = chance.choice(ROLES[first:])
        kinds = {"nursery": KINDS[1:], "spare": KINDS[2:]}.get(role, KINDS)
        latest = 0.03 if role == "launcher" else _LATEST_SECONDS
        return cls(chance.choice(kinds), role, chance.uniform(0, latest), number)


def play(one: Round, server: Server, place: Place) -> tuple[Server, str]:
    """One round; the server that lives after it, and whom it hit ("" for nobody)."""
    if one.kind != "cold" and one.kind not in {record.kind for record in place.note(server.pid)}:
        _expect(server.ask(f"start {one.kind}"), "ran")
        _expect(server.ask("prepare"), "prepared")
    server.say(f"start {one.kind}")
    select.poll().poll(int(one.seconds * 1000))
    there = roles(server.pid, place.note(server.pid))
    # Not all are there at all times: then one who is.
    role = next((role for role in (one.role, "init", "stem") if there[role]), "")
    victim = process(there[role][-1]) if role else None
    if victim and not _hit(victim, one.signal):
        role, victim = "", None
    stranger = _stranger(victim.pid) if victim and one.signal == signal.SIGKILL else None
    answer = server.hear()
    place.note(server.pid)
    if answer == "dead" or role == "server":
        server.close()
        server = Server(place)
    # Who was stopped still is: the next start does without.
    _expect(server.ask(f"start {one.kind}"), "ran")
    place.note(server.pid)
    if victim and one.signal == signal.SIGSTOP:
        _hit(victim, signal.SIGCONT)
    _expect(server.ask("stop"), "stopped")
    sweep(place.runtime)
    kinds = {record.kind for _, record in all_records(place.runtime)}
    _expect("kernel" in kinds, False)
    if stranger:
        _expect(_farewell(stranger), "alive")
    return server, role


def _expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise Failed(f"{found!r}, not {wanted!r}")


def _hit(victim: Process, number: int) -> bool:
    """Whether the process was there to be hit."""
    try:
        pidfd = os.pidfd_open(victim.pid)
    except ProcessLookupError:
        return False
    try:
        if process(victim.pid).start != victim.start:
            return False
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True


def _stranger(pid: int) -> subprocess.Popen[bytes] | None:
    """A process with this id, or nobody: it may not be free yet."""
    if os.geteuid() != 0:
        return None
    words = [sys.executable, "-SI", "-c", STRANGER, str(pid)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _farewell(stranger: subprocess.Popen[bytes]) -> str:
    """How the process that it made is."""
    told, _ = stranger.communicate()
    made, *rest = told.split()
    return rest[0].decode() if int(made) > 0 else "alive"


def finish(server: Server, place: Place) -> None:
    """End all, and raise `Failed` if anything is left."""
    place.note(server.pid)
    server.close()
    for record in _ended(place):
        place.watch.expect_gone(record, place.runtime)
    sweep(place.runtime)
    left = set(os.listdir(place.runtime)) - {"lock"}
    _expect(left, set())
    alive: list[Process] = []

    def all_gone() -> bool:
        alive[:] = [one for one in place.seen if one.exists()]
        return not alive

    if not wait_until(all_gone, _GONE_SECONDS, lambda s: select.poll().poll(int(s * 1000))):
        raise Failed(f"they live on: {[(one.pid, _command(one.pid)) for one in alive]}")


def _ended(place: Place) -> Iterator[Record]:
    """End the nurseries and spares that a killed server has left to the next one."""
    for _, record in all_records(place.runtime):
        pidfd = open_init(record)
        if pidfd is not None:
            signal.pidfd_send_signal(pidfd, record.end_signal)
            select.select([pidfd], [], [], ANSWER_SECONDS)
            os.close(pidfd)
        yield record


def play_all(
    rounds: int,
    seed: int,
    number: int,
    watch: Watch,
    say: Say | None = None,
    *,
    least_hits: int = 0,
) -> Counter[str]:
    """So many rounds, and a look at what is left; how often each role was hit. On a slow machine
    nobody may be there yet at the moment of a hit: up to four times as many until so many were."""
    chance, place = random.Random(seed), Place.make(watch)
    server, hits = Server(place), Counter[str]()
    try:
        for count in range(4 * rounds):
            if count >= rounds and hits.total() - hits[""] >= least_hits:
                break
            one = Round.of(chance, number)
            try:
                server, role = play(one, server, place)
            except Failed as failed:
                raise Failed(f"round {count} of seed {seed}, {one}: {failed}") from None
            hits[role] += 1
            if say:
                say(f"round {count + 1} of {rounds}: {one}: {role or 'nobody'} was hit")
    except BaseException:
        _hit(process(server.pid), signal.SIGKILL)
        raise
    finally:
        finish(server, place)
    return hits
