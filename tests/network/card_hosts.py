"""card_hosts.py - in a process of a test's own: network namespaces that play a host and its world.

Nothing of this machine's own network is touched: `apart` forks, and the child has a namespace of
its own before it does anything. Others are descriptors; a thread that acts in one ends then.

::

    box ──card── host (the child) ── up0 ──veth── world: 20.0.0.2, and all of ADDRESSES on its lo
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pyroute2 import IPRoute

from sandbox_provisioner.facilities.network.card import netlink, nft
from sandbox_provisioner.facilities.network.card.maker import in_namespace
from sandbox_provisioner.facilities.network.plan.netlink import attributes
from sandbox_provisioner.inside import kernel_calls as kernel

_Value = TypeVar("_Value")
NET = "/proc/thread-self/ns/net"
# "everybody", a private neighbour, a cloud's metadata service, a resolver
PUBLIC, OTHER, PRIVATE = "20.1.0.1", "20.2.0.1", "10.9.9.9"
METADATA, RESOLVER = "169.254.169.254", "20.3.0.1"
ADDRESSES = (PUBLIC, OTHER, PRIVATE, METADATA, RESOLVER)
HOST, GATE = "20.0.0.1", "20.0.0.2"
# The same of IPv6; and what 6to4 and NAT64 would carry to PRIVATE.
PUBLIC_6, OTHER_6, PRIVATE_6 = "2a00:1:1::1", "2a00:1:2::1", "fd99::9"
METADATA_6, CARRIED_6, NAT64_6 = "fd00:ec2::254", "2002:a09:909::1", "64:ff9b::a09:909"
ADDRESSES_6 = (PUBLIC_6, OTHER_6, PRIVATE_6, METADATA_6, CARRIED_6, NAT64_6)
HOST_6, GATE_6 = "2a00:1::1", "2a00:1::2"
_NO_DAD = 0x02  # IFA_F_NODAD: nobody asks whether it is somebody's, and it can be used at once


def apart(function: Callable[[], _Value]) -> _Value:
    """What *function* returns in a child that has a network namespace of its own; its error fails
    the test."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        answer: tuple[bool, Any]
        try:
            os.close(read_end)
            kernel.die_with_parent()
            kernel.unshare(kernel.CLONE_NEWNET)
            answer = True, function()
        except BaseException:
            answer = False, traceback.format_exc()
        with open(write_end, "wb") as file:
            pickle.dump(answer, file)
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as file:
        text = file.read()
    os.waitpid(pid, 0)
    assert text, "the child has ended without an answer"
    works, value = pickle.loads(text)
    assert works, f"In the namespace:\n{value}"
    return value  # type: ignore[no-any-return]


def within(namespace: int, act: Callable[[], _Value]) -> _Value:
    """What *act* returns in *namespace*; sockets that it makes stay there."""
    return in_namespace(namespace, act)


def new_namespace() -> int:
    """One with its loopback up."""

    def run() -> int:
        kernel.unshare(kernel.CLONE_NEWNET)
        kernel.loopback_up()
        return os.open(NET, os.O_RDONLY | os.O_CLOEXEC)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def play_host(*, ipv6: bool = False) -> int:
    """Make this process's namespace a host that forwards, *ipv6* too; the world beyond it."""
    kernel.loopback_up()
    world = new_namespace()
    with IPRoute() as route:
        route.link("add", ifname="up0", kind="veth", peer={"ifname": "up0", "net_ns_fd": world})
        _configure(route, "up0", HOST)
        route.route("add", dst="default", gateway=GATE)
    within(world, lambda: _play_world(ipv6=ipv6))
    write("ipv4/conf/up0/forwarding", "1")
    if ipv6:
        with IPRoute() as route:
            _configure(route, "up0", HOST_6, 64)
            route.route("add", dst="default", gateway=GATE_6, family=socket.AF_INET6)
        write("ipv6/conf/all/forwarding", "1")
    return world


def _configure(route: Any, name: str, address: str, length: int = 24) -> None:
    index = socket.if_nametoindex(name)
    _add_address(route, index, address, length)
    route.link("set", index=index, state="up")


def _add_address(route: Any, index: int, address: str, length: int) -> None:
    flags = {"flags": _NO_DAD} if ":" in address else {}
    route.addr("add", index=index, address=address, prefixlen=length, **flags)


def _play_world(*, ipv6: bool) -> None:
    with IPRoute() as route:
        _configure(route, "up0", GATE)
        if ipv6:
            _configure(route, "up0", GATE_6, 64)
        for address in ADDRESSES:
            _add_address(route, 1, address, 32)
        for address in ADDRESSES_6 if ipv6 else ():
            _add_address(route, 1, address, 128)


def write(setting: str, value: str) -> None:
    """A setting of the calling thread's namespace."""
    with open(f"/proc/sys/net/{setting}", "w") as file:
        file.write(value)


def delete_our_table() -> None:
    """As one does who flushes all tables to load others."""
    table = nft.text(1, "sandbox_provisioner")
    netlink.apply([nft.Message("delete our table", nft.DELETE_TABLE, 0, table)])


@contextlib.contextmanager
def listening(namespace: int, port: int = 80, *, ipv6: bool = False) -> Iterator[socket.socket]:
    """A TCP listener at every address of *namespace*; with *ipv6* of both families."""
    listener = within(
        namespace,
        lambda: (
            socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
            if ipv6
            else socket.create_server(("0.0.0.0", port))
        ),
    )
    listener.settimeout(10)
    with listener:
        yield listener


def connect(namespace: int, address: str, port: int = 80, seconds: float = 10) -> socket.socket:
    """A TCP connection from *namespace*."""
    return within(namespace, lambda: socket.create_connection((address, port), seconds))


def refusal(namespace: int, address: str, port: int = 80, seconds: float = 10) -> str:
    """Why one cannot be had, by the name of the error; "" where it can."""
    try:
        connect(namespace, address, port, seconds).close()
    except OSError as error:
        return type(error).__name__ if error.errno is None else os.strerror(error.errno)
    return ""


def dumped(kind: str, word: str) -> list[str]:
    """What the calling thread's namespace has of *kind* ("addr", "link", "route"), with *word*."""
    with IPRoute() as route:
        return [str(found) for found in getattr(route, kind)("dump") if word in str(found)]


def eventually(holds: Callable[[], bool]) -> None:
    """Wait for what Linux does in its own time, and tells nobody of."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        select.poll().poll(10)


def names_in_table() -> list[str]:
    """All chains of the calling thread's namespace."""
    found = netlink.read(nft.GET_CHAIN, every=True)
    return [attributes(text)[3].rstrip(b"\0").decode() for text in found]
