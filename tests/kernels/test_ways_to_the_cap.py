"""However a cell reaches its memory cap: it is interrupted and the variables stay, or the kernel is
killed and the person reads why. Nobody waits for an answer without a word.

Which of both is a matter of the machine's load, and of how much one call allocates: STEPS end with
the interrupt on an idle machine. What is asked for here is true on every one.
"""

from __future__ import annotations

import asyncio
import re
from queue import Empty
from typing import Any

import pytest

from sandbox_provisioner.told import EndKind

pytestmark = pytest.mark.requires("userns", "cgroup-memory")

PATIENCE_SECONDS = 60
MEMORY = "160M"
GROW = "while True: kept.append(bytearray(b'x' * (1 << 20)))"
CHILD = f"kept = []; exec({GROW!r})"
RUN_CHILD = f"[sys.executable, '-c', {CHILD!r}]"
STEPS = {
    "a list": f"kept = []\n{GROW}",
    "a dictionary": "kept = {}\nfor i in range(10**9): kept[i] = str(i) * 20",
    "objects": "class Thing: pass\nkept = []\nwhile True:\n"
    "    one = Thing(); one.text = 'x' * 1000 + str(len(kept)); kept.append(one)",
    "a comprehension": "kept = [str(i) * 50 for i in range(10**9)]",
    "a string that grows": "kept = 'x'\nwhile True: kept += 'x' * (1 << 20)",
    "a byte array": "kept = bytearray()\nwhile True: kept.extend(b'x' * (1 << 16))",
    "a file of text in memory": "import io\nkept = io.StringIO()\n"
    "while True: kept.write('x' * (1 << 16))",
    "json": "import json\ntext = json.dumps([{'a': [1.5, 'xyz']}] * 20000)\nkept = []\n"
    "while True: kept.append(json.loads(text))",
    "pickle": "import pickle\nthing = pickle.dumps([str(i) for i in range(20000)])\nkept = []\n"
    "while True: kept.append(pickle.loads(thing))",
    "regular expressions": "import re\ntext = 'ab ' * (1 << 16)\nkept = []\n"
    "while True: kept.append(re.findall('(a)(b)', text))",
    "decompression": "import zlib\npart = zlib.compress(bytes(1 << 20))\nkept = []\n"
    "while True: kept.append(zlib.decompress(part))",
    "asyncio": "import asyncio\nkept = []\nasync def grow():\n    while True:\n"
    "        kept.append(bytearray(b'x' * (1 << 20))); await asyncio.sleep(0)\n"
    "await asyncio.gather(grow(), grow())",
    "sqlite": "import sqlite3\nkept = sqlite3.connect(':memory:')\n"
    "kept.execute('create table t(x)')\n"
    "while True: kept.executemany('insert into t values (?)', [('x' * 1000,)] * 1000)",
    "a mapping": "import mmap\nkept = []\nwhile True:\n"
    "    one = mmap.mmap(-1, 1 << 20); one.write(b'x' * (1 << 20)); kept.append(one)",
    "a file in /tmp": "kept = open('/tmp/kept', 'wb', buffering=0)\n"
    "while True: kept.write(b'x' * (1 << 20))",
    "a child process": f"import subprocess, sys\nsubprocess.run({RUN_CHILD})",
    "children": "import subprocess, sys\n"
    f"kept = [subprocess.Popen({RUN_CHILD}) for _ in range(3)]\n"
    "[child.wait() for child in kept]",
}
AT_ONCE = {
    "one big allocation": "kept = b'x' * (1 << 30)",
    "a list that doubles": "kept = [1]\nwhile True: kept += kept",
    "a table that is made anew": "kept = set()\nfor i in range(10**9): kept.add(i)",
}
NUMPY = {
    "an array that grows": "import numpy\nkept = numpy.zeros(1)\n"
    "while True: kept = numpy.append(kept, numpy.ones(1 << 17))",
    "arrays": "import numpy\nkept = []\nwhile True: kept.append(numpy.ones(1 << 17))",
}


def until_it_ends(k: Any, code: str) -> tuple[str, str, str]:
    """The request of the cell *code*, how it ended: the name of its error, "dead", or "" where it
    did not fail; and what it showed on standard error until then."""
    request, texts, error = k.client.execute(code), [], ""
    while True:
        try:
            message = k.client.get_iopub_msg(timeout=1)
        except Empty:
            if not k.manager.is_alive():
                return request, "dead", "".join(texts) + rest(k)
            continue
        content = message["content"]
        if message["msg_type"] == "stream":
            texts.append(content["text"])
        elif message["msg_type"] == "error":
            error = content["ename"]
        mine = message["parent_header"].get("msg_id") == request
        if mine and content.get("execution_state") == "idle":
            return request, error, "".join(texts)


def rest(k: Any) -> str:
    """What is said of the death: `is_alive` has returned when it was sent."""
    try:
        while True:
            message = k.client.get_iopub_msg(timeout=PATIENCE_SECONDS)
            if "was killed" in message["content"].get("text", ""):
                return str(message["content"]["text"])
    except Empty:
        return ""


def is_still_said(k: Any, sentences: tuple[str, ...]) -> bool:
    """Whether one of *sentences* comes after the end of the cell; False if the kernel is killed
    before it can show that."""
    for _ in range(PATIENCE_SECONDS):
        try:
            text = k.client.get_iopub_msg(timeout=1)["content"].get("text", "")
        except Empty:
            if not k.manager.is_alive():
                return False
            continue
        if any(sentence in text for sentence in sentences):
            return True
    raise AssertionError(f"nothing says: {sentences}")


def was_killed(k: Any, said: str) -> None:
    """The kernel is dead, and *said* tells why."""
    assert k.provisioner.story.kind is EndKind.MEMORY_CAP, k.provisioner.story
    assert f"it reached its memory limit of {MEMORY[:-1]} MiB" in said


def ends_well(k: Any, code: str) -> None:
    _, error, shown = until_it_ends(k, code)
    said = " ".join(shown.split())
    if error == "dead":
        was_killed(k, said)
        return
    if error:
        assert error in {"KeyboardInterrupt", "CancelledError"}, (error, said)
    # What is said may come after the end of the cell.
    sentences = ("is interrupted: it uses",)
    if not error:  # an interrupt that comes late takes the error with it
        sentences = "A child process", *sentences
    if not any(one in said for one in sentences) and not is_still_said(k, sentences):
        was_killed(k, " ".join(rest(k).split()))
        return
    # What the cell has kept is there still: an answer may be what is too much.
    _, error, shown = until_it_ends(k, "kept = None; assert answer == 42")
    if error == "dead":
        assert k.provisioner.story.kind is EndKind.MEMORY_CAP, k.provisioner.story
        return
    assert not error, shown


@pytest.mark.parametrize("name", [*STEPS, *AT_ONCE])
def test_every_way_to_the_cap_ends_with_the_variables_or_with_the_reason(
    kernel: Any, name: str
) -> None:
    with kernel(mem_limit=MEMORY, tmp_limit="1G") as k:
        k.run("answer = 42")
        ends_well(k, (STEPS | AT_ONCE)[name])


@pytest.mark.requires("numpy")
@pytest.mark.parametrize("name", NUMPY)
def test_arrays_end_with_the_variables_or_with_the_reason(kernel: Any, name: str) -> None:
    with kernel(mem_limit=MEMORY) as k:
        k.run("answer = 42")
        ends_well(k, NUMPY[name])


@pytest.mark.requires("cgroup-v1")  # v2 ends all of a group at once, which the kernel's story tells
def test_a_pool_whose_worker_the_cap_has_killed_says_so_under_the_cell_that_waits(
    kernel: Any,
) -> None:
    code = (
        "import multiprocessing\n"
        "def grow(size): return len(b'x' * size)\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool: pool.map(grow, [1 << 30])\n"
    )
    with kernel(mem_limit=MEMORY, mem_interrupt=0) as k:
        k.run("answer = 42")
        request = k.start(code)
        told = k.until(lambda m: "A child process" in m["content"].get("text", ""), request)
        assert told["content"]["name"] == "stderr"
        k.manager.interrupt_kernel()
        k.until(lambda m: m["content"].get("execution_state") == "idle", request)
        assert k.run("answer") == "42"


def test_threads_that_go_on_after_the_interrupt_are_killed_with_the_reason(kernel: Any) -> None:
    code = (
        "import threading\nkept = []\n"
        f"def grow():\n    {GROW}\n"
        "threads = [threading.Thread(target=grow, daemon=True) for _ in range(3)]\n"
        "[one.start() for one in threads]\n[one.join() for one in threads]"
    )
    with kernel(mem_limit=MEMORY) as k:
        request = k.client.execute(code)
        asyncio.run(k.provisioner.handle.wait())
        assert not k.manager.is_alive()
        k.until(lambda m: "was killed" in m["content"].get("text", ""), request)
        assert k.provisioner.story.kind is EndKind.MEMORY_CAP


def test_a_task_that_fills_the_memory_while_no_cell_runs_is_told_of_at_the_last_one(
    kernel: Any,
) -> None:
    code = (
        "import threading, os\n"
        "def grow():\n"
        "    open('go').read()\n"
        f"    kept = []\n    {GROW}\n"
        "threading.Thread(target=grow, daemon=True).start()"
    )
    with kernel(mem_limit=MEMORY) as k:
        k.run("import os; os.mkfifo('go')")
        request = k.client.execute(code)
        k.until(lambda m: m["content"].get("execution_state") == "idle", request)
        with open("go", "w"):
            pass
        asyncio.run(k.provisioner.handle.wait())
        assert not k.manager.is_alive()
        told = k.until(lambda m: "was killed" in m["content"].get("text", ""), request)
        assert "memory limit" in told["content"]["text"]


def test_who_has_written_all_that_the_disk_limit_allows_is_told_why_and_goes_on(
    kernel: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fill = "file = open('/tmp/file', 'wb', buffering=0)\nwhile True: file.write(bytes(65536))"
    with kernel(disk_limit="8M") as k:
        k.manager.log.propagate = True
        request = k.client.execute(fill)
        failed = k.until(lambda m: m["msg_type"] == "error", request)
        assert "No space left on device" in failed["content"]["evalue"]
        told = k.until(lambda m: "is full" in m["content"].get("text", ""), request)
        assert re.search("/tmp is full; it holds [78] MiB", told["content"]["text"])
        assert "raise disk_limit" in told["content"]["text"]
        assert k.run("6 * 7") == "42"
        assert k.manager.is_alive()
        assert "/tmp of kernel" in caplog.text


def test_a_child_that_finds_no_room_in_shared_memory_is_told_of_under_the_cell(
    kernel: Any, caplog: pytest.LogCaptureFixture
) -> None:
    child = (
        "import mmap, os\n"
        "file = os.open('/dev/shm/kept', os.O_RDWR | os.O_CREAT)\n"
        "os.ftruncate(file, 64 << 20)\n"
        "kept = mmap.mmap(file, 64 << 20)\n"
        "for page in range(0, 64 << 20, 4096): kept[page] = 1\n"
    )
    with kernel(shm_limit="8M") as k:
        k.manager.log.propagate = True
        request = k.client.execute(
            f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}]).returncode"
        )
        told = k.until(lambda m: "is full" in m["content"].get("text", ""), request)
        assert told["content"]["name"] == "stderr"
        assert "/dev/shm is full; it holds 8 MiB" in told["content"]["text"]
        assert "shm_limit" in told["content"]["text"]
        assert k.manager.is_alive()
        assert "/dev/shm of kernel" in caplog.text
