"""world.py - in the test process: network namespaces of the tests' own, a gateway in one of them.

Nothing here touches this machine's network. The *world* has servers at addresses that look public,
a private and a link-local one; a *machine* is joined to it by a cable, and a gateway runs there as
a user without rights. Each *box* has a loopback interface to which every address leads, as a
sandbox has.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import dnslib
from facilities import ordinary_python

import sandbox_provisioner
from sandbox_provisioner.facilities.network.tell.counts import Traffic, read_counts
from sandbox_provisioner.inside import kernel_calls, wire

T = TypeVar("T")

WEB, OTHER, WEB6 = "93.184.216.34", "93.184.216.35", "2606:2800:220::34"
PRIVATE, METADATA, NAMESERVER = "10.7.7.7", "169.254.169.254", "127.0.0.53"
HTTP, TLS, ECHO, FLOOD, UNHEARD = 80, 443, 7000, 7001, 7002
PORTS = (53, HTTP, TLS, ECHO, FLOOD, UNHEARD)
UID = 54321
PATIENCE_SECONDS = 60.0
_CLONE_NEWNET = kernel_calls.CLONE_NEWNET
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75
_WORLD = """
address add 172.31.255.1/30 dev world
address add 2606:2800:221::1/64 dev world nodad
link set world up
address add 93.184.216.34/32 dev lo
address add 93.184.216.35/32 dev lo
address add 10.7.7.7/32 dev lo
address add 169.254.169.254/32 dev lo
address add 2606:2800:220::34/128 dev lo nodad
"""
_MACHINE = """
link set lo up
link add machine type veth peer name world netns {}
address add 172.31.255.2/30 dev machine
address add 2606:2800:221::2/64 dev machine nodad
link set machine up
route add default via 172.31.255.1
route add default via 2606:2800:221::1
"""
_BOX = """
link set lo up
route add local 0.0.0.0/0 dev lo src 127.0.0.1
route add local ::/0 dev lo src ::1
"""


class Place:
    """A thread in a network namespace of its own, in which it calls what it is given: sockets stay
    in the namespace that they were made in, and processes as well."""

    def __init__(self, set_up: str, *, mounts: bool = False) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        flags = _CLONE_NEWNET | (kernel_calls.CLONE_NEWNS if mounts else 0)
        self.call(lambda: kernel_calls.unshare(flags))
        self.ip(set_up)

    def _run(self) -> None:
        while call := self._calls.get():
            call()

    def call(self, function: Callable[[], T]) -> T:
        """What *function* gives, called here."""
        answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def call() -> None:
            try:
                answers.put((function(), None))
            except BaseException as error:
                answers.put((None, error))

        self._calls.put(call)
        value, error = answers.get(timeout=PATIENCE_SECONDS)
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    def ip(self, commands: str) -> None:
        """ip(8)."""
        run = ["ip", "-batch", "-"]
        self.call(
            lambda: subprocess.run(
                run, input=commands, text=True, check=True, timeout=PATIENCE_SECONDS
            )
        )

    def close(self) -> None:
        """The namespace goes with its last socket."""
        self._calls.put(None)
        self._thread.join(PATIENCE_SECONDS)


class Serving:
    """Who accepts at *listener*, and calls *serve* with each connection, in a thread of its own."""

    def __init__(self, listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        self._listener = listener
        self._serve = serve
        self.accepted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._guarded, args=(client,), daemon=True).start()

    def _guarded(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            self._serve(client)

    def close(self) -> None:
        """No more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def echo(client: socket.socket) -> None:
    """Says again what it hears, and ends when the other has."""
    while data := client.recv(1 << 16):
        client.sendall(data)


def flood(client: socket.socket) -> None:
    """Says as many bytes as the first line asks for; then reads to the end, and tells how many."""
    line = b""
    while not line.endswith(b"\n"):
        line += client.recv(1)
    left, block = int(line), bytes(1 << 16)
    while left:
        left -= client.send(block[:left])
    count = 0
    while data := client.recv(1 << 16):
        count += len(data)
    client.sendall(b"%d" % count)


class Hosts(BaseHTTPRequestHandler):
    """A web server that tells which host it was asked for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """The host; or another protocol, which is an echo."""
        if self.headers["Upgrade"]:
            self.send_response(101)
            self.send_header("Upgrade", self.headers["Upgrade"])
            self.end_headers()
            self.wfile.flush()
            echo(self.connection)
            self.close_connection = True
            return
        self._tell(self.headers["Host"] or "nobody")

    def do_POST(self) -> None:
        """The length of the body, which may come in chunks."""
        length = self.headers["Content-Length"]
        self._tell(str(len(self.rfile.read(int(length)) if length else self._chunks())))

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _tell(self, text: str) -> None:
        self.server.hosts.append(text)  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@dataclass
class Dns:
    """A name server: *zone* is what it knows, *asked* what it was asked."""

    zone: dict[str, list[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    stuck: set[str] = field(default_factory=set)

    def serve(self, listener: socket.socket) -> None:
        """Until it is closed."""
        while True:
            try:
                message, sender = listener.recvfrom(4096)
            except OSError:
                return
            if not message:
                return
            query = dnslib.DNSRecord.parse(message)
            name = str(query.q.qname).rstrip(".").lower()
            self.asked.append(name)
            if name not in self.stuck:
                listener.sendto(self._answer(query, name), sender)

    def _answer(self, query: dnslib.DNSRecord, name: str) -> bytes:
        reply = query.reply()
        for address in self.zone.get(name, []):
            kind = "AAAA" if ":" in address else "A"
            if query.q.qtype == getattr(dnslib.QTYPE, kind):
                data = getattr(dnslib, kind)(address)
                reply.add_answer(dnslib.RR(query.q.qname, query.q.qtype, ttl=0, rdata=data))
        if name not in self.zone:
            reply.header.rcode = dnslib.RCODE.NXDOMAIN
        return bytes(reply.pack())


def certificate(folder: Path, *names: str) -> Path:
    """A key and a certificate for *names* that signs itself, in one file."""
    path = folder / "certificate.pem"
    told = ",".join(f"DNS:{name}" for name in names)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "30", "-subj", "/CN=tests", "-addext", f"subjectAltName={told}",
         "-keyout", str(folder / "key"), "-out", str(path)],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_bytes(path.read_bytes() + (folder / "key").read_bytes())
    return path


def _listener(port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.bind(("::", port))
    made.listen(1000)
    return made


class World:
    """The namespace with all servers, and a machine with a gateway and a name server."""

    def __init__(self, folder: Path) -> None:
        self.place = Place("link set lo up")
        tid = self.place.call(threading.get_native_id)
        self.machine = Place(_MACHINE.format(tid), mounts=True)
        self.place.ip(_WORLD)
        self.folder = folder
        self.dns = Dns()
        self.hosts: list[str] = []
        self.sni: list[str | None] = []
        self.certificate = certificate(folder, "data.example.org", "*.example.edu")
        self._own_resolver()
        self._closers: list[Callable[[], None]] = []
        self._serve_dns()
        self._serve_http()
        self.echo = self._serve(ECHO, echo)
        self._serve(FLOOD, flood)
        self._serve(TLS, self._speak_tls)
        self.gateway = Gateway(self)

    def _own_resolver(self) -> None:
        """Mounts of this thread's alone, over those that name servers and hosts."""
        texts = {
            "resolv.conf": f"nameserver {NAMESERVER}\nsearch corp.example\noptions timeout:2\n",
            "hosts": f"127.0.0.1 localhost\n{WEB} in-hosts.example.org\n",
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
        }
        self.machine.call(kernel_calls.make_mounts_private)
        for name, text in texts.items():
            path = self.folder / name
            path.write_text(text)
            command = ["mount", "--bind", str(path), os.path.realpath(f"/etc/{name}")]
            self.machine.call(lambda c=command: subprocess.run(c, check=True))  # type: ignore[misc]

    def listen(self, port: int) -> socket.socket:
        """A listener here, for both families."""
        return self.place.call(lambda: _listener(port))

    def listen_on_machine(self, port: int) -> socket.socket:
        """One on the machine on which the gateway runs."""
        return self.machine.call(lambda: _listener(port))

    def _serve(self, port: int, serve: Callable[[socket.socket], None]) -> Serving:
        serving = Serving(self.listen(port), serve)
        self._closers.append(serving.close)
        return serving

    def _serve_dns(self) -> None:
        listener = self.machine.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        listener.bind((NAMESERVER, 53))
        threading.Thread(target=self.dns.serve, args=(listener,), daemon=True).start()

        def close() -> None:
            with contextlib.suppress(OSError):  # it is not connected, and wakes up nevertheless
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

        self._closers.append(close)

    def _serve_http(self) -> None:
        server = ThreadingHTTPServer(("", 0), Hosts, bind_and_activate=False)
        server.socket.close()
        server.socket = self.listen(HTTP)
        server.hosts = self.hosts  # type: ignore[attr-defined]
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self._closers += [server.shutdown, server.socket.close]

    def _speak_tls(self, client: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        context.sni_callback = lambda _socket, name, _context: self.sni.append(name)
        with context.wrap_socket(client, server_side=True) as secure:
            while data := secure.recv(1 << 16):
                secure.sendall(data)

    def close(self) -> None:
        """All of it."""
        self.gateway.close()
        for close in self._closers:
            close()
        self.place.close()
        self.machine.close()


# A client's first bytes are not waited for as long as for people's programs.
FIRST_BYTES_SECONDS = 2
# A flood is faster than this, however busy the machine is.
LOOKUPS_PER_SECOND = 1
_BOOT = f"""
import sys
sys.path[:0] = sys.argv[1:]
from sandbox_provisioner.gateway import box, connection
from sandbox_provisioner.gateway.main import main
connection.FIRST_BYTES_SECONDS = {FIRST_BYTES_SECONDS}
box.LOOKUPS_PER_SECOND = {LOOKUPS_PER_SECOND}
main()
"""


class Gateway:
    """A gateway process, as a user without rights, in the world's namespace."""

    def __init__(self, world: World, descriptors: int = 0) -> None:
        """It has so many *descriptors*, or as many as this process."""
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(PATIENCE_SECONDS)
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        paths = [str(Path(sandbox_provisioner.__file__).parents[1])]
        paths += [path for path in sys.path if path.endswith("site-packages")]
        identity = [f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--bounding-set=-all"]
        limit = ["prlimit", f"--nofile={descriptors}"] if descriptors else []
        command = [*limit, "setpriv", *identity, ordinary_python(), "-I", "-c", _BOOT, *paths]
        self.process = world.machine.call(
            lambda: subprocess.Popen(
                command, stdin=theirs, stdout=self.errors, stderr=self.errors, env={}, cwd="/"
            )
        )
        theirs.close()
        assert self.say("are you there").startswith("failed ")  # by now it is what it will be

    def status(self, key: str) -> str:
        """A line of proc_pid_status(5)."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(
            line.split(":")[1].strip() for line in text.splitlines() if line.startswith(key)
        )

    def resident_bytes(self) -> int:
        """Its memory, without what Linux has for its sockets."""
        return int(self.status("VmRSS").split()[0]) << 10

    def descriptors(self) -> int:
        """How many it has."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def say(self, text: str, *fds: int) -> str:
        """Its answer."""
        socket.send_fds(self.control, [text.encode()], fds)
        return self.control.recv(4096).decode()

    def log(self) -> str:
        """What it has written."""
        self.errors.seek(0)
        return self.errors.read().decode()

    def close(self) -> None:
        """It ends by itself, with its last box."""
        self.control.close()
        try:
            self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()


def when(look: Callable[[], T], is_so: Callable[[T], object]) -> T:
    """What *look* finds, as soon as *is_so*; where nothing tells of it."""
    for _ in range(int(PATIENCE_SECONDS * 100)):
        if is_so(found := look()):
            return found
        select.poll().poll(10)
    raise AssertionError(found)


class Box:
    """A box that a gateway serves. `call` calls a function in its namespace."""

    def __init__(self, gateway: Gateway, name: str, *, ports: tuple[int, ...] = PORTS,
                 file: Any = None, **settings: Any) -> None:  # fmt: skip
        self.id = name
        self.place = Place(_BOX)
        self.gateway = gateway
        self.file = file or tempfile.TemporaryFile()  # noqa: SIM115
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.settimeout(PATIENCE_SECONDS)
        told = json.dumps({"id": name, **settings})
        with theirs:
            answer = gateway.say(f"box {told}", theirs.fileno(), self.file.fileno())
        assert answer == f"ok {name}", answer
        self._hand_out(ports)

    def _hand_out(self, ports: tuple[int, ...]) -> None:
        found = self.place.call(lambda: [*listeners(ports)])
        words = " ".join(kind for kind, _ in found)
        fds = [listener.fileno() for _, listener in found]
        socket.send_fds(self.channel, [f"{wire.LISTENERS} {words}".encode()], fds)
        for _, listener in found:
            listener.close()

    def connect(self, address: str, port: int) -> socket.socket:
        """A connection of a program inside."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET

        def connected() -> socket.socket:
            made = socket.socket(family, socket.SOCK_STREAM)
            made.settimeout(PATIENCE_SECONDS)
            try:
                made.connect((address, port))
            except BaseException:
                made.close()
                raise
            return made

        return self.place.call(connected)

    def query(self, name: str, kind: str = "A", server: str = "198.18.0.1") -> dnslib.DNSRecord:
        """What the name server says."""
        family = socket.AF_INET6 if ":" in server else socket.AF_INET
        with self.place.call(lambda: socket.socket(family, socket.SOCK_DGRAM)) as asker:
            asker.settimeout(PATIENCE_SECONDS)
            asker.connect((server, 53))
            asker.send(dnslib.DNSRecord.question(name, kind).pack())
            return dnslib.DNSRecord.parse(asker.recv(4096))

    def address_of(self, name: str, kind: str = "A") -> str:
        """The address that stands for *name*; KeyError with the answer's code if there is none."""
        answer = self.query(name, kind)
        if not answer.rr:
            raise KeyError(dnslib.RCODE[answer.header.rcode])
        return str(answer.rr[0].rdata)

    def connect_to(self, name: str, port: int) -> socket.socket:
        """By name."""
        return self.connect(self.address_of(name), port)

    def sentence(self) -> str:
        """The next one that PID 1 is told."""
        word, rest = wire.parts(self.channel.recv(4096))
        assert word == wire.SAY
        return rest

    def counts(self) -> Traffic:
        """What the file has now."""
        return read_counts(lambda most, position: os.pread(self.file.fileno(), most, position))

    def counts_when(self, is_so: Callable[[Traffic], object]) -> Traffic:
        """As soon as *is_so*: the file is written a moment later."""
        return when(self.counts, is_so)

    def close(self) -> None:
        """As when it ends."""
        self.channel.close()
        self.place.close()
        self.file.close()


def listeners(ports: tuple[int, ...]) -> Iterator[tuple[str, socket.socket]]:
    """At each of *ports* of every address, as PID 1 makes them."""
    for port in ports:
        for kind, family, level, transparent in (
            ("tcp4", socket.AF_INET, socket.SOL_IP, _IP_TRANSPARENT),
            ("tcp6", socket.AF_INET6, socket.IPPROTO_IPV6, _IPV6_TRANSPARENT),
        ):
            yield kind, _bound(family, socket.SOCK_STREAM, level, transparent, port)
    yield "udp4", _bound(socket.AF_INET, socket.SOCK_DGRAM, socket.SOL_IP, _IP_TRANSPARENT, 53)
    yield (
        "udp6",
        _bound(socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 53),
    )


def _bound(family: int, kind: int, level: int, transparent: int, port: int) -> socket.socket:
    made = socket.socket(family, kind)
    made.setsockopt(level, transparent, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    made.bind(("", port))
    if kind == socket.SOCK_STREAM:
        made.listen(4096)
    return made
