"""What a program in a box with a gateway sees of the network, with somebody in the gateway's place
who tells what has come out. Nothing can leave but by the listeners."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import select
import socket
import struct
import threading
from pathlib import Path

import pytest
from boxes import USER_IDS, WARM
from stand_in import PATIENCE_SECONDS, in_place_of_the_gateway
from users import as_user

from sandbox_provisioner import host, network_trial
from sandbox_provisioner.errors import HostError, LaunchError
from sandbox_provisioner.facilities.network import plan as network
from sandbox_provisioner.facilities.network.plan.tables import who_gets_what
from sandbox_provisioner.inside import wire
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.spec import Network, NetworkWish

pytestmark = pytest.mark.requires("userns")

GATEWAY = NetworkWish(mode=Network.GATEWAY)
CARD = NetworkWish(mode=Network.CARD)


@pytest.fixture
def warm(monkeypatch):
    monkeypatch.setenv(WARM, "1")


@pytest.fixture
def captive(sandbox, monkeypatch):
    """A box, and who has its listeners."""
    with in_place_of_the_gateway(monkeypatch) as outside:
        with sandbox(network=GATEWAY) as box:
            outside.take()
            yield box, outside


def connect_and_talk(host, port):
    import socket

    with socket.create_connection((host, port), 10) as connection:
        connection.sendall(b"from inside")
        return connection.recv(100).decode(), connection.getpeername()[0]


@pytest.mark.parametrize(
    ("host", "kind", "wanted"),
    [
        ("93.184.216.34", "tcp4", "93.184.216.34"),
        ("198.18.3.7", "tcp4", "198.18.3.7"),
        ("10.0.0.1", "tcp4", "10.0.0.1"),
        ("169.254.169.254", "tcp4", "169.254.169.254"),
        ("::ffff:1.2.3.4", "tcp4", "1.2.3.4"),
        ("3232235777", "tcp4", "192.168.1.1"),
        ("0300.0250.1.1", "tcp4", "192.168.1.1"),
        ("2001:db8::7", "tcp6", "2001:db8::7"),
        ("fd53:616e:6462:6f78::9", "tcp6", "fd53:616e:6462:6f78::9"),
    ],
)
def test_a_connection_to_any_address_comes_out_as_what_it_was(captive, host, kind, wanted):
    box, outside = captive
    box.send(connect_and_talk, host, 8443)
    connection, meant_for = outside.accept(kind)
    with connection:
        assert connection.recv(100) == b"from inside"
        connection.sendall(b"from outside")
        assert meant_for == (wanted, 8443)
        assert box.receive()[0] == "from outside"


def both_come_out(box, outside, host, port):
    """A connection to *host*, as what it was meant for, and a question to any name server."""
    box.send(connect_and_talk, host, port)
    connection, meant_for = outside.accept()
    with connection:
        connection.sendall(b"from outside")
        assert (box.receive()[0], meant_for) == ("from outside", (host, port))
    box.send(ask, "8.8.8.8", 53)
    assert outside.answer(b"an answer") == b"a question"
    assert box.receive() == "an answer"


def connects_and_asks(box, outside):
    """Whether its connections and questions come out, and nothing else does."""
    both_come_out(box, outside, "93.184.216.34", 443)
    assert set(box.call(get_around).values()) == {
        "EPERM", "EACCES", "EPROTONOSUPPORT", "EAFNOSUPPORT",
    }  # fmt: skip


@pytest.mark.ordinary_user
def test_an_ordinary_users_has_the_same(captive):
    connects_and_asks(*captive)


@pytest.mark.slow("a nursery is made for it")
def test_one_from_a_nursery_has_the_same(warm, captive):
    connects_and_asks(*captive)


@pytest.mark.slow("a nursery is made for it")
@pytest.mark.ordinary_user
def test_an_ordinary_users_from_a_nursery_has_the_same(warm, captive):
    connects_and_asks(*captive)


@pytest.mark.requires("root", "setpriv", "public-python", "newuidmap")
def test_one_with_a_range_of_ids_has_the_same(user_home):
    code = user_home / "code"
    words = ("-q", "-p", "no:cacheprovider", f"--basetemp={user_home}/base/t")
    files = ("-c", f"{code}/pyproject.toml", f"{code}/tests/inside/test_captive.py")
    chosen = ("-k", "test_an_ordinary_users_has_the_same")
    told = as_user(user_home, "-m", "pytest", *words, *files, *chosen, **{USER_IDS: "range"})
    assert "1 passed" in told


def ask(server, port):
    import socket

    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as asker:
        asker.settimeout(10)
        asker.connect((server, port))
        asker.send(b"a question")
        return asker.recv(100).decode()


@pytest.mark.parametrize(
    ("server", "kind"),
    [
        ("198.18.0.1", "udp4"),
        ("8.8.8.8", "udp4"),
        ("127.0.0.53", "udp4"),
        ("2001:4860:4860::8888", "udp6"),
    ],
)
def test_a_question_to_any_nameserver_is_answered_by_that_one(captive, server, kind):
    box, outside = captive
    box.send(ask, server, 53)
    assert outside.answer(b"an answer", kind) == b"a question"
    assert box.receive() == "an answer"


def asked_names(has_services):
    import socket

    def asked(name, **how):
        try:
            return [found[4][0] for found in socket.getaddrinfo(name, 80, **how)]
        except socket.gaierror as error:
            return str(error)

    numbers = {"type": socket.SOCK_STREAM, "family": socket.AF_INET}
    return {
        "localhost": asked("localhost", **numbers),
        "own": asked(socket.gethostname(), **numbers),
        "service": socket.getservbyname("https") if has_services else 443,
        "configured": asked("example.org", flags=socket.AI_ADDRCONFIG, **numbers),
        "refused": asked("refused.example", **numbers),
    }


def test_the_c_library_asks_the_gateway_for_names_that_are_not_its_own(captive):
    """Also where a program asks for what the box's interfaces could use (AI_ADDRCONFIG)."""
    box, outside = captive
    asked = outside.answer_names({"example.org": "198.18.3.7"})
    told = box.call(asked_names, Path("/etc/services").exists())  # not every machine has it
    assert told == {
        "localhost": ["127.0.0.1"],
        "own": ["127.0.0.1"],
        "service": 443,
        "configured": ["198.18.3.7"],
        "refused": "[Errno -2] Name or service not known",
    }
    assert asked == ["example.org", "refused.example"]


# -- what is refused


def wait_for_an_answer():
    import errno
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.settimeout(10)
        sender.connect(("8.8.8.8", 123))
        for act in (lambda: sender.send(b"x"), lambda: sender.recv(100)):
            try:
                act()
            except OSError as error:
                last = errno.errorcode[error.errno]
        return last


def send_elsewhere():
    import socket

    def sent(target, payload=b"x", protocol=0):
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM, protocol) as sender:
            sender.settimeout(10)
            try:
                sender.sendto(payload, target)
            except OSError as error:
                return error.errno
            return f"sent: {sender.recv(100)!r}"

    return {
        "time": sent(("8.8.8.8", 123)),
        "quic": sent(("2001:db8::1", 443)),
        "multicast": sent(("224.0.0.251", 5353)),
    }


def test_other_datagrams_are_refused_at_once(captive):
    box, outside = captive
    assert set(box.call(send_elsewhere).values()) == {errno.EPERM}
    assert box.call(wait_for_an_answer) == "ECONNREFUSED"
    for name in ("udp4", "udp6"):
        outside.listeners[name].setblocking(False)
        with pytest.raises(BlockingIOError):
            outside.listeners[name].recv(100)


def get_around():
    import errno
    import fcntl
    import socket
    import struct

    def error_of(act):
        try:
            act()
        except OSError as error:
            return errno.errorcode[error.errno]
        return "it was done"

    def change(kind, body):
        """A message of rtnetlink(7), and what Linux answers."""
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link:
            link.send(struct.pack("=IHHII", 16 + len(body), kind, 5, 1, 0) + body)
            (code,) = struct.unpack_from("=i", link.recv(4096), 16)
            if code:
                raise OSError(-code, "")

    everything = struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 255, 3, 254, 2, 0)
    rule = struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 255, 3, 0, 1, 0)
    name = struct.pack("16sH14x", b"lo", 0)
    own = socket.socket()
    mark, transparent = 36, 19
    return {
        "raw": error_of(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)),
        "packet": error_of(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)),
        "ping": error_of(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 1)),
        "tables": error_of(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)),
        "delete the route": error_of(lambda: change(25, everything)),
        "delete the rule": error_of(lambda: change(33, rule)),
        "delete the interface": error_of(lambda: change(17, struct.pack("=BxHiII", 0, 0, 1, 0, 0))),
        "bring it down": error_of(lambda: fcntl.ioctl(own, 0x8914, name)),
        "its port": error_of(lambda: socket.socket().bind(("0.0.0.0", 53))),
        "its port at one address": error_of(lambda: socket.socket().bind(("10.0.0.1", 53))),
        "transparent": error_of(lambda: own.setsockopt(socket.SOL_IP, transparent, 1)),
        "mark": error_of(lambda: own.setsockopt(socket.SOL_SOCKET, mark, 1)),
    }


def test_no_program_can_change_who_gets_what(captive):
    box, _ = captive
    told = box.call(get_around)
    ports = {"its port": "EACCES", "its port at one address": "EACCES"}
    kinds = {"tables": "EPROTONOSUPPORT", "packet": "EAFNOSUPPORT", "ping": "EACCES"}
    assert told == dict.fromkeys(told, "EPERM") | ports | kinds


def serve_inside():
    """Two programs of the box, over addresses that are its own."""
    import socket

    def met(family, listen_at, call_at):
        with socket.socket(family) as server:
            server.bind((listen_at, 0))
            server.listen()
            port = server.getsockname()[1]
            with socket.create_connection((call_at, port), 10) as client:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"from a neighbour")
                    return client.recv(100).decode()

    four, six = socket.AF_INET, socket.AF_INET6
    with (
        socket.socket(four, socket.SOCK_DGRAM) as one,
        socket.socket(four, socket.SOCK_DGRAM) as two,
    ):
        one.bind(("127.0.0.1", 0))
        one.settimeout(10)
        two.sendto(b"a datagram", one.getsockname())
        datagram = one.recv(100).decode()
    with socket.socket() as looking, socket.socket(four, socket.SOCK_DGRAM) as used:
        used.connect(("8.8.8.8", 80))  # how programs look for their own address
        try:
            looking.connect(("127.0.0.1", 9))
        except ConnectionRefusedError:
            nobody = "refused"
        own = used.getsockname()[0]
    return {
        "loopback": met(four, "127.0.0.1", "127.0.0.1"),
        "another of it": met(four, "0.0.0.0", "127.8.9.10"),
        "any": met(four, "0.0.0.0", "0.0.0.0"),
        "name": met(four, "127.0.0.1", socket.gethostname()),
        "interface": met(four, "0.0.0.0", "192.0.0.8"),
        "six": met(six, "::1", "::1"),
        "datagram": datagram,
        "own": own,
        "nobody": nobody,
    }


def test_what_programs_of_the_box_say_to_one_another_stays_there(captive):
    box, outside = captive
    told = box.call(serve_inside)
    assert told.pop("own") == "127.0.0.1"
    assert told.pop("nobody") == "refused"
    assert told.pop("datagram") == "a datagram"
    assert set(told.values()) == {"from a neighbour"}
    for listener in outside.listeners.values():
        assert not select.select([listener], [], [], 0)[0]


def serve_everywhere_and_call(host):
    """A program that would be the host itself, for its own box."""
    import socket

    with socket.socket() as server:
        server.bind(("0.0.0.0", 8080))
        server.listen()
        with socket.create_connection((host, 8080), 10) as client:
            client.settimeout(10)
            told = client.recv(100).decode()
        server.setblocking(False)
        try:
            server.accept()
        except BlockingIOError:
            return told


def test_who_listens_everywhere_inside_is_not_who_is_called_outside(captive):
    box, outside = captive
    box.send(serve_everywhere_and_call, "93.184.216.34")
    connection, meant_for = outside.accept()
    with connection:
        connection.sendall(b"from outside")
    assert (box.receive(), meant_for) == ("from outside", ("93.184.216.34", 8080))


def call_again(first):
    import errno
    import socket

    def error_of(act):
        try:
            act()
        except OSError as error:
            return errno.errorcode[error.errno]
        return "it was done"

    def ask():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            asker.settimeout(10)
            asker.connect(("198.18.0.1", 53))
            asker.send(b"a question")
            asker.recv(100)

    return error_of(lambda: socket.create_connection((first, 443), 10)), error_of(ask)


def test_without_its_gateway_a_box_has_no_network_and_nobody_waits(captive):
    box, outside = captive
    outside.end()
    assert box.call(call_again, "93.184.216.34") == ["ECONNREFUSED"] * 2
    assert box.call(serve_inside)["loopback"] == "from a neighbour"


def test_its_end_is_the_gateways_notice_that_the_box_is_gone(captive):
    box, outside = captive
    box.finish()
    outside.channel.settimeout(30)
    assert outside.channel.recv(100) == b""


def test_a_box_that_nobody_would_dial_for_does_not_start(sandbox, monkeypatch):
    monkeypatch.setattr(LocalLauncher, "attachment", lambda *_: None)
    with pytest.raises(LaunchError, match=r"hand-out-listeners.*nobody was there to dial"):
        with sandbox(network=GATEWAY):
            pass


def test_a_machine_without_ipv6_gives_its_boxes_none(sandbox, monkeypatch):
    monkeypatch.setattr(host, "has_ipv6", lambda: False)
    with in_place_of_the_gateway(monkeypatch) as outside:
        with sandbox(network=GATEWAY) as box:
            outside.take()
            assert sorted(outside.listeners) == ["tcp4", "udp4"]
            box.send(connect_and_talk, "93.184.216.34", 443)
            connection, _ = outside.accept()
            with connection:
                connection.sendall(b"from outside")
                assert box.receive()[0] == "from outside"
            with pytest.raises(OSError, match=r"ENETUNREACH|101"):
                box.call(connect_and_talk, "2001:db8::7", 443)


# -- where Linux hands nothing over


@pytest.fixture
def without_tables(monkeypatch):
    """A Linux that answers to the tables as one that has none."""
    real = who_gets_what()
    other = real.data.replace(struct.pack("!BBH", 0, 0, 10), struct.pack("!BBH", 0, 0, 0))
    missing = dataclasses.replace(real, data=other)
    monkeypatch.setattr(network, "who_gets_what", lambda: missing)
    network_trial.forget()
    yield
    network_trial.forget()


def test_there_the_ports_that_rules_name_are_listened_at_and_no_others(
    sandbox, monkeypatch, without_tables
):
    allow = "data.example.org", "db.example.org:5432"
    with in_place_of_the_gateway(monkeypatch) as outside:
        with sandbox(network=NetworkWish(mode=Network.GATEWAY, allow=allow)) as box:
            outside.take()
            assert sorted(outside.at) == [
                *((kind, port) for kind in ("tcp4", "tcp6") for port in (53, 80, 443, 5432)),
                ("udp4", 53), ("udp6", 53),
            ]  # fmt: skip
            outside.listeners["tcp4"] = outside.at["tcp4", 5432]
            both_come_out(box, outside, "10.0.0.1", 5432)
            with pytest.raises(ConnectionRefusedError):
                box.call(connect_and_talk, "10.0.0.1", 8443)
            assert box.call(wait_for_an_answer) == "ECONNREFUSED"
            assert "listen" in {step.verb for step in sandbox.explain(network=GATEWAY).steps}


def test_what_linux_said_is_told(sandbox, without_tables):
    (why,) = (step.why for step in sandbox.explain(network=GATEWAY).steps if step.verb == "listen")
    assert why.startswith("no other ports, since netlink(protocol=12, message='(all of them)')")
    assert "ENOTSUP" in why


def test_more_ports_than_can_be_handed_out_are_refused(sandbox, without_tables):
    allow = tuple(f"data.example.org:{port}" for port in range(1000, 1200))
    with pytest.raises(HostError, match="modprobe"):
        sandbox.explain(network=NetworkWish(mode=Network.GATEWAY, allow=allow))


def test_a_trial_that_could_not_be_made_says_nothing_of_the_next_start(
    sandbox, without_tables, monkeypatch
):
    monkeypatch.setenv(wire.FAIL_AT, "unshare")
    assert len([s for s in sandbox.explain(network=GATEWAY).steps if s.verb == "netlink"]) == 2
    monkeypatch.delenv(wire.FAIL_AT)
    assert len([s for s in sandbox.explain(network=GATEWAY).steps if s.verb == "netlink"]) == 1


def test_this_machine_has_all_that_it_takes(sandbox):
    steps = [step.verb for step in sandbox.explain(network=GATEWAY).steps]
    assert steps.count("netlink") == 2


# -- a network card, with somebody in the place of who makes it


def interfaces():
    import os
    import socket

    names = [name for _, name in socket.if_nameindex()]
    with open("/etc/resolv.conf") as file:
        return names, os.readlink("/proc/self/ns/net"), file.read()


def give_card(channel, answer, given):
    """As who makes cards: it is asked with the network namespace, and answers."""
    channel.settimeout(PATIENCE_SECONDS)
    text, fds, _, _ = socket.recv_fds(channel, 100, 1)
    given.append((text, os.readlink(f"/proc/self/fd/{fds[0]}")))
    os.close(fds[0])
    channel.send(answer)


@pytest.fixture
def card_maker(monkeypatch):
    """Starts somebody who answers so; what it was given."""
    with contextlib.ExitStack() as stack:

        def answer(text):
            given = []
            outside = stack.enter_context(in_place_of_the_gateway(monkeypatch))
            thread = threading.Thread(target=give_card, args=(outside.channel, text, given))
            thread.start()
            stack.callback(thread.join)
            return given

        yield answer


@pytest.mark.requires("root")
def test_a_box_waits_for_its_card_which_is_put_into_its_own_network(sandbox, card_maker):
    given = card_maker(wire.message(wire.UP))
    with sandbox(network=CARD) as box:
        names, network, _ = box.call(interfaces)
    assert given == [(wire.message(wire.NETNS), network)]
    assert names == ["lo"]


@pytest.mark.requires("root")
def test_a_card_that_cannot_be_had_is_an_error_that_says_why(sandbox, card_maker):
    card_maker(wire.message(wire.FAILED, "there is no address left in 100.64.0.0/16"))
    with pytest.raises(LaunchError, match=r"await-card.*no address left in 100.64.0.0/16"):
        with sandbox(network=CARD):
            pass
