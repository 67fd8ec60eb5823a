"""Spares: kernels that wait ready for a start, what they are bound to, and what ends them."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import AsyncKernelManager, KernelManager
from warmth import (
    RANDOM,
    came_from,
    children_of,
    made,
    nurseries,
    spares,
    state_of,
    wait_for_end,
)

import sandbox_provisioner
from benchmarks.common import wait_until
from sandbox_provisioner import launch
from sandbox_provisioner.facilities.process import plan as process_plan
from sandbox_provisioner.facilities.storage import quotas
from sandbox_provisioner.facilities.storage.facts import STORAGE, WorkdirQuota
from sandbox_provisioner.inside.wire import FAIL_AT
from sandbox_provisioner.launcher import verbs
from sandbox_provisioner.performer import Performer
from sandbox_provisioner.plan import HOME
from sandbox_provisioner.records import Record, all_records
from sandbox_provisioner.stem import stem
from sandbox_provisioner.sweeping import sweep
from sandbox_provisioner.warm import ahead, found
from sandbox_provisioner.warm.found import Spare

pytestmark = pytest.mark.requires("userns")


@pytest.fixture
def spare(warm: Any, runtime_dir: Path) -> Record:
    """The record of the spare that a first, cold start has made."""
    with warm(spares=1):
        ahead.wait()
    (record,) = spares(runtime_dir)
    return record


def came_from_spare(k: Any) -> str:
    """The name of the groups that its kernel was born in, "" if it was no spare."""
    return str(k.provisioner.handle.record.group)


# -- bound to a start


def test_a_start_gets_the_spare_and_the_next_one_is_made(
    warm: Any, runtime_dir: Path, spare: Record
) -> None:
    with warm(spares=1) as k:
        assert came_from_spare(k) == spare.sandbox_id
        assert came_from(k) == spare.nursery
        assert k.run("6 * 7") == "42"
        ahead.wait()
        (second,) = spares(runtime_dir)
        assert second.sandbox_id != spare.sandbox_id
        k.manager.restart_kernel()
        k.client.wait_for_ready(timeout=60)
        assert came_from_spare(k) == second.sandbox_id
        assert k.run("6 * 7") == "42"
    ahead.wait()
    assert [record.kind for _, record in all_records(runtime_dir)] == ["nursery", "spare"]


def test_a_kernel_that_was_a_spare_cannot_be_told_from_a_cold_one(
    warm: Any, kernel: Any, spare: Record, workdir: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", str(workdir / "one.ipynb"))
    with kernel(warm=False) as cold, warm(spares=1) as k:
        assert came_from_spare(k) == spare.sandbox_id
        cold_state, spare_state = state_of(cold), state_of(k)
    assert spare_state["session_name"] == str(workdir / "one.ipynb")
    for key, value in cold_state.items():
        assert (key, spare_state[key]) == (key, value)


def test_a_client_that_is_early_hears_nothing_that_is_signed_by_another_key(
    kernel: Any, kernelspec: Any, spare: Record
) -> None:
    """Variables that no nursery depends on keep the kernel busy before it has its key."""
    many = {f"CLICOLOR_OF_{number}": "1" for number in range(10_000)}
    manager = KernelManager(kernel_name=kernelspec(warm=True, spares=1))
    with kernel(manager, {"env": os.environ | many}) as k:
        assert came_from_spare(k) == spare.sandbox_id
        names = "__import__('os').environ"
        assert k.run(f"sum(n.startswith('CLICOLOR_OF_') for n in {names})") == str(len(many))


# The name is written the other way round, so that it is not found in this text itself.
SEARCH = """
found = 0
wanted = b"bnypi.rehtona-fo"[::-1]
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
    for words in map(str.split, maps.read().splitlines()):
        start, end = (int(word, 16) for word in words[0].split("-"))
        if words[1].startswith("rw"):
            memory.seek(start)
            found += memory.read(end - start).count(wanted)
print(found - 1)
"""


@pytest.mark.slow("it looks through all memory of a kernel")
def test_a_spare_knows_nothing_of_the_notebook_that_it_was_made_after(
    warm: Any, runtime_dir: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "/srv/of-another.ipynb")
    with warm(spares=1):
        ahead.wait()
    monkeypatch.delenv("JPY_SESSION_NAME")
    (spare,) = spares(runtime_dir)
    with warm(spares=1) as k:
        assert came_from_spare(k) == spare.sandbox_id
        assert int(k.run(SEARCH)) <= 0


def test_a_spare_works_in_the_directory_of_its_start_and_nowhere_else(
    warm: Any, workdir: Path, spare: Record
) -> None:
    (workdir / "data.txt").write_text("here")
    with warm(spares=1) as k:
        assert came_from_spare(k) == spare.sandbox_id
        assert k.run("open('data.txt').read()") == "'here'"
        k.run("open('new.txt', 'w').write('mine')")
        for path in ("/", "/run/kernel", "/run/other", "/etc", "/opt", "/.scratch"):
            assert "Error" in k.run(f"open('{path}/new', 'w')"), path
    new = workdir / "new.txt"
    assert new.read_text() == "mine"
    assert new.stat().st_uid == workdir.stat().st_uid


def test_covers_and_volumes_hold_in_a_spare(
    warm: Any, workdir: Path, new_folder: Any, monkeypatch: Any, runtime_dir: Path
) -> None:
    volume = new_folder()
    volume.chmod(0o755)
    (volume / "given").write_text("data")
    hooks = workdir / ".git" / "hooks"
    hooks.mkdir(parents=True)
    (hooks / "secret").write_text("never shown")
    options = {"spares": 1, "volumes": [f"{volume}:/data"]}
    with warm(**options):
        ahead.wait()
    (spare,) = spares(runtime_dir)
    with warm(**options) as k:
        assert came_from_spare(k) == spare.sandbox_id
        assert (
            k.run("import os; os.listdir('.git/hooks'), os.listdir('/data')") == "([], ['given'])"
        )
        assert "Read-only" in k.run("open('/data/new', 'w')")
        k.run("open('.git/hooks/post-commit', 'w').write('evil')")
    assert os.listdir(hooks) == ["secret"]


@pytest.mark.requires("root", "loop")
def test_a_spare_has_its_image_from_before_it_is_claimed_and_it_goes_with_the_kernel(
    warm: Any, runtime_dir: Path
) -> None:
    kind = "__import__('subprocess').getoutput('stat -f -c %T /tmp')"
    with warm(spares=1, disk_limit="16M") as k:
        assert k.run(kind) == "'ext2/ext3'"
        ahead.wait()
        (spare,) = spares(runtime_dir)
        image = STORAGE / spare.sandbox_id
        assert image.exists()
    with warm(spares=1, disk_limit="16M") as k:
        assert came_from_spare(k) == spare.sandbox_id
        assert k.run(kind) == "'ext2/ext3'"
        k.run("open('/tmp/file', 'w').write('kept')")
        assert image.exists()
    assert not image.exists()


def test_a_spare_has_the_limit_of_its_work_directory_from_when_it_is_claimed(
    warm: Any, runtime_dir: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before that nobody knows which one: what sets it is a test's own."""
    held: list[str] = []

    def find(_wish: Any, place: Any, *_: Any, **__: Any) -> WorkdirQuota:
        return WorkdirQuota(path=place.path, filesystem="xfs", size_bytes=1 << 40)

    def hold(fd: int, _quota: WorkdirQuota, **_: Any) -> None:
        held.append(os.readlink(f"/proc/self/fd/{fd}"))

    monkeypatch.setattr(launch, "find_workdir_quota", find)
    monkeypatch.setattr(quotas, "hold", hold)
    with warm(spares=1):
        ahead.wait()
    assert held == [str(workdir)]
    (spare,) = spares(runtime_dir)
    with warm(spares=1) as k:
        assert came_from_spare(k) == spare.sandbox_id
        assert held == [str(workdir)] * 2


def test_no_two_spares_share_a_random_number_or_a_secret(warm: Any, runtime_dir: Path) -> None:
    with warm(spares=2, preload=["numpy"]):
        ahead.wait()
    assert len(spares(runtime_dir)) == 2
    with warm(spares=2, preload=["numpy"]) as one, warm(spares=2, preload=["numpy"]) as other:
        assert came_from_spare(one) != came_from_spare(other) != ""
        values = [json.loads(k.run(RANDOM)) for k in (one, other)]
    assert len(values[0]) == 10
    assert not set(values[0]) & set(values[1])


@pytest.mark.requires("cgroup-memory")
def test_a_spare_that_reaches_its_memory_limit_says_why(warm: Any, runtime_dir: Path) -> None:
    options = {"spares": 1, "mem_limit": "256M", "mem_interrupt": 0}
    with warm(**options):
        ahead.wait()
    (spare,) = spares(runtime_dir)
    with warm(**options) as k:
        assert came_from_spare(k) == spare.sandbox_id
        k.client.execute("b = bytearray(300 << 20)")
        story = asyncio.run(k.provisioner.handle.wait())
        assert story.oom_killed
        assert "reached its memory limit of 256 MiB" in story.reason


@pytest.mark.requires("cgroup-memory")
def test_a_spare_is_interrupted_before_its_memory_limit(warm: Any, runtime_dir: Path) -> None:
    options = {"spares": 1, "mem_limit": "512M"}
    with warm(**options):
        ahead.wait()
    (spare,) = spares(runtime_dir)
    with warm(**options) as k:
        assert came_from_spare(k) == spare.sandbox_id
        told = k.run("kept = []\nwhile True: kept.append(bytearray(1 << 20))")
        assert "KeyboardInterrupt" in told
        assert k.run("len(kept) > 100") == "True"


def test_other_options_or_variables_get_another_spare_or_none(
    warm: Any, spare: Record, monkeypatch: Any
) -> None:
    with warm(spares=1, pids_limit=100) as k:
        assert came_from_spare(k) == ""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with warm(spares=1) as k:
        assert came_from_spare(k) == ""


def test_a_kernel_whose_home_is_the_work_directory_comes_from_the_nursery(
    warm: Any, workdir: Path, monkeypatch: Any, runtime_dir: Path
) -> None:
    monkeypatch.setenv("HOME", str(workdir))
    with warm(spares=1):
        made(runtime_dir)
    assert not spares(runtime_dir)
    with warm(spares=1) as k:
        assert (bool(came_from(k)), came_from_spare(k)) == (True, "")
        assert k.run("import os; os.environ['HOME'] != '" + HOME + "'") == "True"


def test_a_spare_is_claimed_once(runtime_dir: Path, warm: Any, spare: Record) -> None:
    (link,) = runtime_dir.glob("*.spare")
    key = link.name.partition("-")[0]
    whose = found.Whose(os.geteuid(), "")
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda _: found.claim(runtime_dir, key, whose), range(8)))
    (won,) = [claim for claim in claims if claim]
    assert won.record.sandbox_id == spare.sandbox_id
    won.channel.close()  # a server that dies then: its spare ends
    wait_for_end(spare)
    assert leaves_nothing(runtime_dir)


@pytest.mark.slow("twenty kernels")
def test_twenty_starts_at_once_share_what_spares_there_are(
    warm: Any, kernelspec: Any, spare: Record
) -> None:
    name = kernelspec(warm=True, spares=1)

    async def all_of_them() -> list[tuple[str, str]]:
        managers = [AsyncKernelManager(kernel_name=name) for _ in range(20)]
        try:
            await asyncio.gather(*(m.start_kernel() for m in managers))
            records = [m.provisioner.handle.record for m in managers]
            return [(record.nursery, record.group) for record in records]
        finally:
            await asyncio.gather(*(m.shutdown_kernel(now=True) for m in managers))

    told = asyncio.run(all_of_them())
    assert {nursery for nursery, _ in told} == {spare.nursery}
    assert [group for _, group in told].count(spare.sandbox_id) == 1


# -- while it waits


def state_letter(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_spare_is_stopped(spare: Record) -> None:
    (kernel_pid,) = children_of(spare.init_pid)
    assert state_letter(kernel_pid) == "T"
    threads = os.listdir(f"/proc/{kernel_pid}/task")
    assert len(threads) > 3
    assert {state_letter(int(thread)) for thread in threads} == {"T"}


def test_an_idle_spare_ends(warm: Any, runtime_dir: Path) -> None:
    with warm(spares=1, warm_idle_timeout=2.0):
        ahead.wait()
        for record in (*spares(runtime_dir), *nurseries(runtime_dir)):
            wait_for_end(record)
        assert leaves_nothing(runtime_dir)


def leaves_nothing(runtime_dir: Path) -> bool:
    """Whether what ended spares have left goes before anybody starts a kernel; no event tells."""

    def is_gone() -> bool:
        return not (spares(runtime_dir) or list(runtime_dir.glob("*.spare")))

    return wait_until(is_gone, 10, lambda seconds: select.poll().poll(int(1000 * seconds)))


def test_a_spare_ends_with_its_nursery_and_goes_at_once_while_others_of_it_live(
    warm: Any, runtime_dir: Path, spare: Record
) -> None:
    (nursery,) = nurseries(runtime_dir)
    with warm(spares=1) as k:
        assert came_from_spare(k) == spare.sandbox_id
        ahead.wait()
        (second,) = spares(runtime_dir)
        channel = found.call(runtime_dir / nursery.sandbox_id / found.SOCKET)
        assert channel
        with channel:
            channel.send(b"retire")
        wait_for_end(second)
        assert leaves_nothing(runtime_dir)
        assert k.run("6 * 7") == "42"


@pytest.mark.slow("a spare looks at memory every few seconds")
def test_a_spare_gives_way_when_memory_is_short(
    warm: Any, runtime_dir: Path, monkeypatch: Any
) -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(process_plan, "least_available_bytes", lambda: whole)
    monkeypatch.setattr(ahead, "available_bytes", lambda: 2 * whole)
    with warm(spares=1):
        ahead.wait()
        (spare,) = spares(runtime_dir)
        wait_for_end(spare)


def test_a_spare_is_given_the_directory_that_was_judged_whatever_its_path_is_then(
    warm: Any, workdir: Path, spare: Record, new_folder: Any, monkeypatch: Any
) -> None:
    sub, begin = workdir / "sub", Performer.begin
    sub.mkdir()
    right = os.stat(sub).st_ino

    def swapped(opener: Performer, *words: Any) -> None:
        assert opener.source is stem
        monkeypatch.setattr(Performer, "begin", begin)
        sub.rename(workdir / "moved")
        sub.symlink_to(new_folder())
        begin(opener, *words)

    monkeypatch.setattr(Performer, "begin", swapped)
    monkeypatch.chdir(sub)
    with warm(spares=1) as k:
        assert came_from_spare(k) == spare.sandbox_id
        assert k.run("import os; print(os.stat('.').st_ino)").strip() == str(right)
    assert sub.is_symlink()


def test_none_is_made_when_memory_is_short(warm: Any, runtime_dir: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ahead, "available_bytes", lambda: 0)
    with warm(spares=1):
        made(runtime_dir)
        assert not spares(runtime_dir)


# -- what goes wrong


VERBS = (
    "receive", "attach", "cover", "protect", "private-file", "close-root", "environment",
    "bind-kernel", "make-user-namespace", "unshare-user-namespace", "find-again", "take-place",
    "hand-over",
)  # fmt: skip


@pytest.mark.parametrize("step", VERBS)
def test_a_spare_that_cannot_be_bound_is_no_reason_not_to_start(
    warm: Any, workdir: Path, runtime_dir: Path, monkeypatch: Any, step: str, caplog: Any
) -> None:
    assert step in verbs.VERBS
    (workdir / ".git").mkdir()
    (workdir / ".git/config").touch()
    with warm(spares=1):
        ahead.wait()
    (spare,) = spares(runtime_dir)
    before = sorted(workdir.rglob("*"))
    monkeypatch.setattr(ahead, "prepare", lambda *words: None)
    real = os.environ.get

    def once(name: str, default: Any = None) -> Any:
        """Fails the spare's binding, and not the cold start that comes after it."""
        return (
            step if name == FAIL_AT and (runtime_dir / spare.tree).exists() else real(name, default)
        )

    monkeypatch.setattr(os.environ, "get", once)
    with warm(spares=1) as k:
        monkeypatch.undo()
        assert k.run("6 * 7") == "42"
    assert sorted(workdir.rglob("*")) == before
    wait_for_end(spare)


def test_a_spare_that_hangs_is_no_reason_not_to_start(
    warm: Any, spare: Record, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Spare, "patience_seconds", 0.5)
    os.kill(spare.init_pid, signal.SIGSTOP)
    with warm(spares=1) as k:
        assert k.provisioner.handle.record.group != spare.sandbox_id
        assert k.run("6 * 7") == "42"
        wait_for_end(spare)


def test_a_spare_that_was_killed_is_no_reason_not_to_start(
    warm: Any, runtime_dir: Path, spare: Record
) -> None:
    os.kill(spare.init_pid, 9)
    wait_for_end(spare)
    with warm(spares=1) as k:
        assert came_from_spare(k) == ""
        assert came_from(k) == spare.nursery
        assert k.run("6 * 7") == "42"


def test_a_server_that_is_killed_leaves_spares_that_another_one_can_use(
    kernelspec: Any, runtime_dir: Path, warm: Any
) -> None:
    name = kernelspec(warm=True, spares=1)
    ours = str(Path(sandbox_provisioner.__file__).parents[1])  # another copy has other nurseries
    script = f"""
import os, sys
sys.path.insert(0, {ours!r})
from jupyter_client.manager import KernelManager
from sandbox_provisioner.warm import ahead
ahead._PATIENCE_SECONDS = 0.0  # as in this process
m = KernelManager(kernel_name={name!r})
m.start_kernel()
ahead.wait()
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -9
    (spare,) = spares(runtime_dir)
    with warm(spares=1) as k:
        assert came_from_spare(k) == spare.sandbox_id
        assert k.run("6 * 7") == "42"
    ahead.wait()
    (nursery,) = nurseries(runtime_dir)
    channel = found.call(runtime_dir / nursery.sandbox_id / found.SOCKET)
    assert channel
    with channel:
        channel.send(b"retire")
    wait_for_end(nursery)
    sweep(runtime_dir)
    assert not all_records(runtime_dir)
