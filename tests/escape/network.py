"""network.py - inside: networks, sockets, and what processes say to one another."""

from __future__ import annotations

import os
import socket

from frame import Kind, attempt
from tools import SECRET, call, closed, done, fcntl, read

INET, INET6, STREAM, DATAGRAM, RAW = 2, 10, 1, 2, 3

# -- the host's own


@attempt(
    220, "connect to a port of the host's 127.0.0.1", Kind.NETWORK, "a server of the host",
    expect="ECONNREFUSED", landlock="EAFNOSUPPORT", control="done",
)  # fmt: skip
def connect_to_port(host):
    return socket.socket().connect(("127.0.0.1", host.port))


for number, name, address in (
    (221, "the Internet", "1.1.1.1"),
    (222, "a cloud's metadata", "169.254.169.254"),
    (223, "the local network", "192.168.1.1"),
):

    @attempt(
        number, f"find a way to {name}", Kind.NETWORK, "the network namespace", address,
        expect="ENETUNREACH", landlock="EAFNOSUPPORT", control="done",
    )  # fmt: skip
    def find_way(host, address):
        """connect(2) of a datagram socket sends nothing; it looks for the way."""
        return socket.socket(type=socket.SOCK_DGRAM).connect((address, 53))


@attempt(
    224, "find another interface than lo", Kind.NETWORK, "the network namespace",
    expect="lo", landlock="ENOTSUP", control="others",
)  # fmt: skip
def find_interfaces(host):
    names = [name for _, name in socket.if_nameindex()]
    return "others" if names != ["lo"] else "lo"


@attempt(
    225, "change an interface", Kind.NETWORK, "SIOCSIFFLAGS", expect="EPERM",
    landlock="EAFNOSUPPORT", control="done",
)  # fmt: skip
def change_interface(host):
    probe = socket.socket(type=socket.SOCK_DGRAM)
    request = bytearray(b"lo".ljust(40, b"\0"))
    fcntl.ioctl(probe, 0x8913, request)
    fcntl.ioctl(probe, 0x8914, request)
    return "done"


@attempt(
    226, "mark packets for the host's routes", Kind.NETWORK, "SO_MARK", expect="EPERM",
    landlock="EPERM", control="done",
)  # fmt: skip
def mark(host):
    one = socket.socketpair()[0] if host.boxed else socket.socket()
    return one.setsockopt(socket.SOL_SOCKET, 36, 1)


@attempt(
    227, "set rules of a firewall", Kind.NETWORK, "CVE-2021-22555", expect="EPERM",
    landlock="EAFNOSUPPORT", control="EINVAL|ENOPROTOOPT",
)  # fmt: skip
def set_rules(host):
    return socket.socket().setsockopt(0, 64, bytes(8))


@attempt(
    228, "open the network namespace of a socket", Kind.NETWORK, "SIOCGSKNS", expect="EPERM",
    control="done",
)  # fmt: skip
def open_namespace(host):
    one = socket.socketpair()[0]
    os.close(fcntl.ioctl(one, 0x894C))
    return "done"


# -- families and protocols

FAMILIES = (
    (230, "AF_PACKET", (17, RAW, 0), "CVE-2017-7308, CVE-2020-14386"),
    (231, "AF_ALG", (38, 5, 0), "Copy Fail: pages of files that are only read"),
    (232, "AF_VSOCK", (40, STREAM, 0), "CVE-2021-26708"),
    (233, "AF_KEY", (15, RAW, 2), "xfrm"),
    (234, "AF_XDP", (44, RAW, 0), "CVE-2024-50115 and its kind"),
    (235, "AF_TIPC", (30, STREAM, 0), "CVE-2021-43267"),
    (236, "AF_RDS", (21, 5, 0), "CVE-2010-3904"),
    (237, "AF_CAN", (29, RAW, 1), "CVE-2021-34866 and its kind"),
    (238, "AF_BLUETOOTH", (31, RAW, 1), "CVE-2020-12352"),
    (239, "AF_SMC", (43, STREAM, 0), "CVE-2025-22123 and its kind"),
    (240, "AF_PPPOX", (24, STREAM, 0), "a module that is loaded at first use"),
    (241, "AF_QIPCRTR", (42, DATAGRAM, 0), "a module that is loaded at first use"),
)
NETLINKS = (
    (242, "NETLINK_NETFILTER", 12, "CVE-2024-1086"),
    (243, "NETLINK_XFRM", 6, "CVE-2017-16939"),
    (244, "NETLINK_AUDIT", 9, "the machine's audit log"),
    (245, "NETLINK_KOBJECT_UEVENT", 15, "what devices the machine has"),
    (246, "NETLINK_SOCK_DIAG", 4, "other processes' sockets"),
    (247, "NETLINK_GENERIC", 16, "families of modules"),
    (248, "NETLINK_CRYPTO", 21, "algorithms of modules"),
)
PROTOCOLS = (
    (249, "a raw socket", (INET, RAW, 1), "EPERM", "forged packets"),
    (250, "SCTP", (INET, STREAM, 132), "EPROTONOSUPPORT", "CVE-2019-8956"),
    (251, "MPTCP", (INET, STREAM, 262), "EPROTONOSUPPORT", "CVE-2021-23133 and its kind"),
    (252, "UDP-Lite", (INET, DATAGRAM, 136), "EPROTONOSUPPORT", "rarely used code"),
    (253, "L2TP", (INET, DATAGRAM, 115), "EPROTONOSUPPORT", "CVE-2022-4129"),
    (254, "a packet socket by its old name", (INET, 10, 768), "EPERM", "packet(7)"),
)


def can(*words):
    """Whether this machine has that kind of socket."""
    try:
        socket.socket(*words).close()
    except OSError:
        return False
    return True


ROWS = [
    *((n, name, words, "EAFNOSUPPORT", why, "EAFNOSUPPORT") for n, name, words, why in FAMILIES),
    *(
        (n, name, (16, RAW, number), "EPROTONOSUPPORT", why, "ENOTSUP")
        for n, name, number, why in NETLINKS
    ),
    *((n, name, words, expect, why, "EAFNOSUPPORT") for n, name, words, expect, why in PROTOCOLS),
]
for number, name, words, expect, stands_for, landlocked in ROWS:

    @attempt(
        number, f"make a socket: {name}", Kind.NETWORK, stands_for, words,
        expect=expect, landlock=landlocked, control="done", present=can(*words),
    )  # fmt: skip
    def make_socket(host, words):
        return closed("socket", *words)


@attempt(
    255, "put TLS into the Linux kernel", Kind.NETWORK, "CVE-2023-0461, TCP_ULP",
    expect="ENOPROTOOPT", landlock="EAFNOSUPPORT", control="ENOTCONN|ENOENT",
)  # fmt: skip
def load_tls(host):
    return socket.socket().setsockopt(6, 31, b"tls")


@attempt(
    256, "make a pair of sockets of another family", Kind.NETWORK, "socketpair(2), TIPC",
    expect="EAFNOSUPPORT", landlock="ENOTSUP", control="EOPNOTSUPP|ENOTSUP",
)  # fmt: skip
def pair(host):
    return done("socketpair", 16, 3, 0, bytes(8))


# -- names of sockets


@attempt(
    260, "connect to a socket file of the host", Kind.SOCKETS, "D-Bus, agents, docker.sock",
    expect="ENOENT", landlock="EACCES", control="done",
)  # fmt: skip
def connect_to_file(host):
    return socket.socket(socket.AF_UNIX).connect(host.socket)


@attempt(
    261, "connect to an abstract socket of the host", Kind.SOCKETS, "CVE-2020-15257",
    expect="ECONNREFUSED", landlock="EACCES", control="done",
)  # fmt: skip
def connect_to_abstract(host):
    return socket.socket(socket.AF_UNIX).connect(host.abstract)


@attempt(
    262, "see the host's sockets", Kind.SOCKETS, "/proc/net/unix",
    expect="not seen", landlock="EACCES", control="seen",
)  # fmt: skip
def see_sockets(host):
    return "seen" if host.place in open("/proc/net/unix").read() else "not seen"


@attempt(
    263, "see the host's connections", Kind.SOCKETS, "/proc/net/tcp",
    expect="not seen", landlock="EACCES", control="seen",
)  # fmt: skip
def see_connections(host):
    return "seen" if f":{host.port:04X} " in open("/proc/net/tcp").read() else "not seen"


@attempt(
    264, "attach a segment of shared memory of the host", Kind.SOCKETS, "System V IPC",
    expect="ENOENT", landlock="ENOSYS", control="there",
)  # fmt: skip
def attach_memory(host):
    call("shmget", host.shm_key, 0, 0)
    return "there"


@attempt(
    265, "open a queue of the host", Kind.SOCKETS, "POSIX queues",
    expect="ENOENT", landlock="ENOSYS", control="done",
)  # fmt: skip
def open_queue(host):
    return closed("mq_open", host.queue.encode(), os.O_RDWR, 0, None)


@attempt(
    266, "open a file of the host in /dev/shm", Kind.SOCKETS, "POSIX shared memory",
    expect="ENOENT", landlock="EACCES", control=SECRET,
)  # fmt: skip
def open_shared(host):
    return read(host.shm_file)


@attempt(
    267, "list the host's shared memory", Kind.SOCKETS, "/proc/sysvipc",
    expect="not seen", landlock="EACCES", control="seen",
)  # fmt: skip
def list_shared(host):
    return "seen" if str(host.shm_key) in open("/proc/sysvipc/shm").read() else "not seen"
