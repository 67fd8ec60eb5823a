"""``python -m tests.gpu``: kernels with a real GPU of NVIDIA's, through its specification.

Not in CI, which has no GPU. Needs root, torch and an NVIDIA driver; where no specification names
nvidia.com/gpu=0 one is written for the time of the run (`driver.py`). *--root* is a directory with
another root that has ipykernel; *--user* a number, for an ordinary user's kernels. Each line is a
check with what was seen; the exit status is the number of those that failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

from benchmarks import start
from sandbox_provisioner.warm import ahead
from tests.clients import run, text_of
from tests.gpu import driver

MEMORY = "16G"
_POLICY = "[everyone.ceilings]\ndevices = [{}]\n"
PATIENCE_SECONDS = 120

MULTIPLY = """
import torch
torch.manual_seed(0)
a, b = torch.randn(512, 512), torch.randn(512, 512)
off = (torch.mm(a.cuda(), b.cuda()).cpu() - torch.mm(a, b)).abs().max().item()
print(torch.cuda.get_device_name(0), off < 1e-2)
"""
# The driver's own interface, where there is no torch: memory there and back.
DRIVER = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
made, name = ctypes.c_void_p(), ctypes.create_string_buffer(100)
at, back = ctypes.c_ulonglong(), ctypes.create_string_buffer(16)
told = [cuda.cuInit(0), cuda.cuDeviceGetName(name, 100, 0),
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(made), 0), cuda.cuCtxSetCurrent(made),
        cuda.cuMemAlloc_v2(ctypes.byref(at), 16), cuda.cuMemcpyHtoD_v2(at, b"sixteen of bytes", 16),
        cuda.cuMemcpyDtoH_v2(back, at, 16)]
print(name.value.decode(), told, back.raw.decode())
"""
NOTHING = """
import ctypes, glob, os, stat
found = []
try:
    found.append(ctypes.CDLL("/usr/local/nvidia/lib64/libcuda.so.1").cuInit(0))
except OSError as error:
    found.append("no library")
for major, minor in MAJORS:
    try:
        os.mknod("/tmp/n", stat.S_IFCHR | 0o666, os.makedev(major, minor))
        os.open("/tmp/n", os.O_RDWR)
        found.append("opened")
    except OSError as error:
        found.append(error.strerror)
print(glob.glob("/dev/nvidia*"), glob.glob("/proc/driver/nvidia*"), found)
"""
# Memory of the machine that the driver takes for a process: is it the kernel's, as Linux counts?
PINNED = """
import torch
torch.zeros(1).cuda()
held = [torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True).fill_(1) for _ in range(COUNT)]
print(len(held), "pieces of 256 MiB")
"""
MANAGED = """
import ctypes, torch
torch.zeros(1).cuda()
cuda = ctypes.CDLL("libcuda.so.1")
at = ctypes.c_ulonglong()
told = cuda.cuMemAllocManaged(ctypes.byref(at), ctypes.c_size_t(COUNT << 28), 1)
ctypes.memset(at.value, 1, COUNT << 28)
print(told, COUNT, "pieces of 256 MiB")
"""


class Checks:
    """What was seen, a line each."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, name: str, check: Callable[[], tuple[bool, str]]) -> None:
        begin = time.perf_counter()
        try:
            held, seen = check()
        except Exception:
            held, seen = False, traceback.format_exc(limit=4)
        self.failed += not held
        taken = time.perf_counter() - begin
        print(f"{'ok' if held else 'FAILED':6} {name} ({taken:.1f} s)\n         {seen}", flush=True)


@contextlib.contextmanager
def kernel(**options: Any) -> Iterator[tuple[KernelManager, Any]]:
    """One in a box with *options*, and its client."""
    argv = [options.pop("python", sys.executable), "-m", "ipykernel_launcher"]
    stanza = {"provisioner_name": "sandbox-provisioner", "config": options}
    found = {"argv": [*argv, "-f", "{connection_file}"], "display_name": "gpu",
             "language": "python", "metadata": {"kernel_provisioner": stanza}}  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "kernels/gpu")
        folder.mkdir(parents=True)
        (folder / "kernel.json").write_text(json.dumps(found))
        (Path(place) / "work").mkdir()
        manager = KernelManager(kernel_name="gpu", transport="ipc")
        manager.kernel_spec_manager = KernelSpecManager(kernel_dirs=[str(folder.parent)])
        manager.start_kernel(cwd=f"{place}/work")
        with start.client_of(manager, PATIENCE_SECONDS) as client:
            yield manager, client


def answer(code: str, **options: Any) -> str:
    """What *code* shows in a new kernel."""
    with kernel(**options) as (_, client):
        return str(run(client, code, timeout=PATIENCE_SECONDS)).strip()


def with_gpu(**options: Any) -> dict[str, Any]:
    """Options of a kernel with one."""
    return {"devices": [driver.NAME], "mem_limit": MEMORY, "warm": False, **options}


def in_use() -> list[str]:
    """Processes that hold the GPU, and its memory, as the machine's own tool tells."""
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[:1]


def majors() -> list[tuple[int, int]]:
    """Of the GPU's nodes."""
    found = [os.stat(path).st_rdev for path in ("/dev/nvidia0", "/dev/nvidiactl")]
    return [(os.major(number), os.minor(number)) for number in found]


def none_without() -> tuple[bool, str]:
    seen = answer(NOTHING.replace("MAJORS", repr(majors())), warm=False)
    return seen.startswith("[] [] [") and "opened" not in seen and "[0" not in seen, seen


def multiplies(**options: Any) -> tuple[bool, str]:
    seen = answer(MULTIPLY, **with_gpu(**options))
    return seen.endswith("True"), seen


def warm_multiplies() -> tuple[bool, str]:
    options = with_gpu(warm=True, preload=["torch"])
    first, second = answer(MULTIPLY, **options), ""
    ahead.wait()
    with kernel(**options) as (manager, client):
        second = str(run(client, MULTIPLY, timeout=PATIENCE_SECONDS)).strip()
        is_warm = bool(manager.provisioner.handle.record.nursery)
    return is_warm and first == second and second.endswith("True"), f"{second}, warm: {is_warm}"


def driver_works(root: str) -> tuple[bool, str]:
    seen = answer(DRIVER, **with_gpu(rootfs=root, python="/usr/bin/python3"))
    return "sixteen of bytes" in seen, seen


def smi_works() -> tuple[bool, str]:
    found = (
        "import subprocess; print(subprocess.run(['PATH', '-L'], capture_output=True, text=True))"
    )
    path = subprocess.run(["which", "nvidia-smi"], capture_output=True, text=True, check=True)
    seen = answer(found.replace("PATH", path.stdout.strip()), **with_gpu())
    return "GPU 0" in seen, seen


def two_at_once() -> tuple[bool, str]:
    hold = "import torch; held = torch.ones(1 << 30, dtype=torch.uint8, device='cuda'); print(1)"
    with kernel(**with_gpu()) as (_, one), kernel(**with_gpu()) as (_, other):
        seen = [run(client, hold, timeout=PATIENCE_SECONDS).strip() for client in (one, other)]
        told = in_use()
    return seen == ["1", "1"], f"{seen}, both hold 1 GiB: {told} in use"


def counted(code: str) -> tuple[bool, str]:
    """8 GiB of the machine's memory at a cap of 4: not had, and told."""
    before = _available()
    with kernel(**with_gpu(mem_limit="4G", mem_interrupt=0)) as (manager, client):
        asked = client.execute(code.replace("COUNT", "32"))
        seen = _until(asked, manager, client)
        taken = before - _available()
        story = manager.provisioner.story
    told = f"{seen.strip()[-300:]!r}; the machine had {taken >> 20} MiB less; {story}"
    return "32 pieces" not in seen, told


def _until(asked: str, manager: KernelManager, client: Any) -> str:
    """What a cell shows until it, or its kernel, has ended."""
    shown: list[Any] = []
    while True:
        try:
            message = client.get_iopub_msg(timeout=0.5)
        except queue.Empty:
            if not manager.is_alive():
                return f"{text_of(shown)} (ended)"
            continue
        if message["parent_header"].get("msg_id") == asked:
            shown.append(message)
            if message["content"].get("execution_state") == "idle":
                return text_of(shown)


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def nothing_left(before: list[str]) -> tuple[bool, str]:
    now = in_use()
    return now == before, f"{before} before, {now} now"


@contextlib.contextmanager
def broker(policy: str) -> Iterator[str]:
    """The socket of one with *policy*."""
    with tempfile.TemporaryDirectory(dir="/run") as place:
        os.chmod(place, 0o755)
        Path(place, "policy.toml").write_text(policy)
        words = [sys.executable, "-m", "sandbox_provisioner.app", "broker", "--socket",
                 f"{place}/socket", "--policy", f"{place}/policy.toml"]  # fmt: skip
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr
            try:
                next(line for line in process.stderr if '"listen"' in line)
                yield f"{place}/socket"
            finally:
                process.terminate()
                for _ in process.stderr:
                    pass


def as_user(uid: int, name: str, **options: Any) -> tuple[bool, str]:
    """The check *name* in a process of an ordinary user."""
    words = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", sys.executable, "-m",
             "tests.gpu", "--as-user", name, json.dumps(options)]  # fmt: skip
    with tempfile.TemporaryDirectory() as home:
        os.chown(home, uid, uid)
        variables = {"HOME": home, "PATH": os.environ["PATH"], "PYTHONPATH": os.getcwd()}
        done = subprocess.run(
            words, env=variables, stdout=subprocess.PIPE, text=True, timeout=PATIENCE_SECONDS
        )
    return done.returncode == 0, done.stdout.strip()


def through_broker(uid: int, name: str, policy: str) -> tuple[bool, str]:
    with broker(policy) as path:
        return as_user(uid, name, launcher="broker", broker_socket=path)


def is_refused(**options: Any) -> tuple[bool, str]:
    try:
        answer(MULTIPLY, **with_gpu(**options))
    except Exception as error:
        return driver.NAME in str(error) and "no policy says" in str(error), str(error)
    return False, "it started"


def has_none(**options: Any) -> tuple[bool, str]:
    seen = answer(NOTHING.replace("MAJORS", "[]"), **with_gpu(**options))
    return seen == "[] [] [100]", seen  # CUDA_ERROR_NO_DEVICE


_OF_USER = {"multiplies": multiplies, "is_refused": is_refused, "has_none": has_none}


def main() -> int:
    """All checks, or one of an ordinary user."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="")
    parser.add_argument("--user", type=int, default=0)
    parser.add_argument("--as-user", nargs=2, metavar=("CHECK", "OPTIONS"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.as_user:
        held, seen = _OF_USER[asked.as_user[0]](**json.loads(asked.as_user[1]))
        print(seen)
        return 0 if held else 1
    checks, writes = Checks(), not driver.SPECIFICATION.exists()
    if writes:
        driver.write()
    try:
        run_all(checks, asked.root, asked.user)
    finally:
        ahead.end_own()
        if writes:
            driver.SPECIFICATION.unlink()
    return checks.failed


def run_all(checks: Checks, root: str, uid: int) -> None:
    """In order: the first ones need nothing that later ones show."""
    before = in_use()
    checks("a kernel that asked for none has none", none_without)
    checks("a kernel has it", multiplies)
    checks("a kernel from a nursery has it", warm_multiplies)
    checks("nvidia-smi works inside", smi_works)
    checks("two kernels share one", two_at_once)
    if root:
        checks("a kernel of another root has it", lambda: driver_works(root))
    checks("pinned memory counts", lambda: counted(PINNED))
    checks("managed memory counts", lambda: counted(MANAGED))
    checks("it is free when all have ended", lambda: nothing_left(before))
    if uid:
        waived = {"memory": "warn", "pids": "warn", "cpu": "warn"}
        checks("a user's own kernel has it", lambda: as_user(uid, "multiplies", on_missing=waived))
        for told, check, policy in (
            ("one through the broker has it", "multiplies", _POLICY.format(f'"{driver.NAME}"')),
            ("without a policy it is refused", "is_refused", ""),
            ("where a policy gives none it has none", "has_none", _POLICY.format("")),
        ):
            checks(told, partial(through_broker, uid, check, policy))


if __name__ == "__main__":
    raise SystemExit(main())
