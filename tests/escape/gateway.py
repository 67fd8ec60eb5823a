"""gateway.py - inside: a kernel with a network that allows all that is public.

Whom it must not reach is the machine itself, of which nothing is public: what is tried here sends
nothing to anybody else, whether it succeeds or not. `tests/network` has a world of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct

from frame import VARIANTS, Kind, attempt
from tools import SECRET, done

OPTIONS = {"network": "gateway", "network_allow": ["all"]}
# A kernel of its own for each way to have a warm one would take seconds; tests/inside shows that
# those have the same network.
ELSEWHERE = {v.name: None for v in VARIANTS if v.options.get("warm")} | {"landlock": None}
ROW = {"options": OPTIONS, **ELSEWHERE}
REFUSED = "ECONNRESET|ECONNREFUSED"

WAYS = (
    (700, "its address", "{own}"),
    (701, "its address as one number", "{number}"),
    (702, "its address in octal", "{octal}"),
    (703, "its address within one of IPv6", "::ffff:{own}"),
    (704, "127.0.0.1", "127.0.0.1"),
    (705, "0.0.0.0, which is a machine itself", "0.0.0.0"),
)
for number, name, form in WAYS:

    @attempt(
        number, f"speak with a server of the machine by {name}", Kind.NETWORK, "SSRF", form,
        expect=REFUSED, control=SECRET if number < 704 else f"{SECRET}|ECONNREFUSED", **ROW,
    )  # fmt: skip
    def speak(host, form):
        parts = host.own.split(".")
        octal = ".".join(f"0{int(part):o}" for part in parts)
        number = int.from_bytes(map(int, parts), "big")
        address = form.format(own=host.own, octal=octal, number=number)
        with socket.create_connection((address, host.own_port), 20) as one:
            return one.recv(100).decode()


@attempt(
    706, "speak with a server of the machine by its name", Kind.NETWORK, "DNS rebinding",
    expect=f"{REFUSED}|gaierror", control=SECRET, **ROW,
)  # fmt: skip
def speak_by_name(host):
    with socket.create_connection((host.name, host.own_port), 20) as one:
        return one.recv(100).decode()


@attempt(
    707, "connect to an abstract socket of the machine", Kind.SOCKETS, "CVE-2020-15257",
    expect="ECONNREFUSED", control="done", **ROW,
)  # fmt: skip
def connect_by_abstract_name(host):
    return socket.socket(socket.AF_UNIX).connect(host.abstract)


@attempt(
    708, "send a datagram to the machine", Kind.NETWORK, "QUIC, NTP, everything but DNS",
    expect="EPERM|ECONNREFUSED|done", control="done", **ROW,
)  # fmt: skip
def send_datagram(host):
    """Where its address is a loopback address that is the box itself."""
    if host.boxed and host.own.startswith("127."):
        return "done"
    socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", (host.own, 9))
    return "sent" if host.boxed else "done"


@attempt(
    709, "have packets that are for others", Kind.NETWORK, "IP_TRANSPARENT",
    expect="EPERM", control="done", **ROW,
)  # fmt: skip
def be_transparent(host):
    return socket.socket().setsockopt(socket.SOL_IP, 19, 1)


@attempt(
    710, "listen in the gateway's place", Kind.NETWORK, "SO_REUSEPORT",
    expect="EACCES", control="done", **ROW,
)  # fmt: skip
def listen_in_its_place(host):
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind((host.own if host.boxed else "127.0.0.2", 53 if host.boxed else 0))
    return "done"


MESSAGES = (
    (711, "make another route", 24, struct.pack("=BBBBBBBBI", 2, 32, 0, 0, 254, 3, 253, 1, 0)),
    (712, "delete the route by which all leads to the gateway", 25,
     struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 255, 3, 254, 2, 0)),
    (713, "make an interface", 16, struct.pack("=BxHiII", 0, 0, 0, 0, 0)),
)  # fmt: skip
for number, name, kind, body in MESSAGES:

    @attempt(
        number, name, Kind.NETWORK, "rtnetlink(7)", kind, body, expect="EPERM",
        no_control="it would change this machine's network", **ROW,
    )  # fmt: skip
    def tell_linux(host, kind, body):
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link:
            link.send(struct.pack("=IHHII", 16 + len(body), kind, 5, 1, 0) + body)
            (code,) = struct.unpack_from("=i", link.recv(4096), 16)
        if code:
            raise OSError(-code, "")
        return "done"


@attempt(
    714, "change who gets what is sent", Kind.NETWORK, "nf_tables, CVE-2024-1086",
    expect="EPROTONOSUPPORT", control="done", **ROW,
)  # fmt: skip
def open_tables(host):
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12).close()


@attempt(
    715, "find the gateway's channel among one's own descriptors", Kind.DESCRIPTORS,
    "what the gateway is told, and its listeners",
    expect="none", no_control="without a box nobody makes one", **ROW,
)  # fmt: skip
def find_channel(host):
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(fd))) as one:
                waits = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                is_low = one.family != socket.AF_UNIX and waits and one.getsockname()[1] < 1024
                if is_low or one.type == socket.SOCK_SEQPACKET:
                    found.append(fd)
        except OSError:
            continue
    return ",".join(found) or "none"


@attempt(
    716, "take the gateway's channel from the first process", Kind.PROCESSES, "pidfd_getfd(2)",
    expect="EPERM|EACCES|ENOSYS", no_control="the machine's first process is not to be touched",
    **ROW,
)  # fmt: skip
def take_channel(host):
    return ",".join(os.listdir("/proc/1/fd")) or done("pidfd_getfd", 3, 3, 0)


FEW_CONNECTIONS = {"at_once": 20, "new_per_second": 1000}
CROWD = 40


@attempt(
    717, "take the connections that other kernels could have", Kind.NETWORK, "a queue for all",
    expect=str(FEW_CONNECTIONS["at_once"]), control=str(CROWD),
    options=OPTIONS | {"network_connections": FEW_CONNECTIONS}, **ELSEWHERE,
)  # fmt: skip
def crowd(host):
    """The gateway itself answers at port 53; it is asked what stands at an address."""
    query = struct.pack(">6H", 7, 0x100, 1, 0, 0, 0) + b"\x011" * 4
    query += b"\x07in-addr\x04arpa\0" + struct.pack(">2H", 12, 1)
    target = ("1.1.1.1", 53) if host.boxed else (host.own, host.own_port)
    held, answered = [], 0
    for _ in range(40):
        with contextlib.suppress(OSError):
            held.append(socket.create_connection(target, 20))
            if host.boxed:
                held[-1].sendall(struct.pack(">H", len(query)) + query)
            answered += bool(held[-1].recv(100))
    return str(answered)
