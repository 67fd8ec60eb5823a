"""What a user sends the broker who wants more than is theirs, or wants nobody to have anything."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path
from typing import Any

import pytest
import users
from brokers import Broker, Refused, User

from sandbox_provisioner.broker.wishes import QUESTIONS

pytestmark = pytest.mark.requires("userns", "root", "cgroup-memory", "setpriv", "public-python")

# What a start has besides, and as many connections as a user may have; much more came than that.
FEW = 64
PIPE_BYTES = 1 << 16  # pipe(7)


def refusal(told: dict[str, Any]) -> str:
    """What was answered, which is no start."""
    return f"{told['error']['attempt']}: {told['error']['answer']}"


def are_closed(broker: Broker, before: int) -> bool:
    """Whether they are before long: threads do it, a few at a time for each user, so that most of
    what is turned away in a flood waits for one."""
    end = time.monotonic() + 30
    while broker.descriptors() >= before + FEW and time.monotonic() < end:
        select.poll().poll(20)
    return broker.descriptors() < before + FEW


def test_nobody_works_in_what_is_another_users(broker: Broker, user: User) -> None:
    """That one may open it says that it may be read; an id-mapped mount would make it the
    kernel's."""
    for name, owner, group in (("theirs", 0, 0), ("others", 4999, 4999), ("group", 4321, 4999)):
        folder = broker.home / name
        folder.mkdir(mode=0o777)
        folder.chmod(0o777)
        os.chown(folder, owner, group)
        ask = """
message = wish(cwd=path)
message["start"]["spec"]["workdir"] = path
answer = send(message, [*streams(), directory(path)])
"""
        told = refusal(user(ask, path=str(folder)))
        assert f"use '{folder}' as the work directory" in told
        assert ("its group is gid 4999" if group != owner else f"belongs to uid {owner}") in told
        # The name of one's own directory does not make another one's one's own.
        told = refusal(user("answer = start([*streams(), directory(path)])", path=str(folder)))
        assert "belongs to uid" in told or "its group is" in told
        volume = """
message = wish()
message["start"]["spec"]["volumes"] = [dict(source=path, target="/data", readonly=False)]
answer = send(message, [*streams(), directory(), directory(path)])
"""
        assert "Show it read-only" in str(user(volume, path=str(folder)))
    assert not broker.records()


def test_another_users_files_are_shown_as_to_any_other_user(broker: Broker, user: User) -> None:
    """A volume that only may be read is not mapped: modes count for the kernel as for anybody."""
    folder = broker.home / "course"
    folder.mkdir()
    (folder / "open").write_text("for all")
    (folder / "open").chmod(0o666)
    (folder / "closed").write_text("for root")
    (folder / "closed").chmod(0o600)
    code = f"""
kernel = Kernel(volumes=["{folder}:/course"])
answer = [kernel("print(open('/course/open').read())"), kernel("open('/course/closed')"),
          kernel("open('/course/open', 'a')")]
kernel.end()
"""
    shown, closed, written = user(code)
    assert shown == "for all"
    assert "PermissionError" in closed
    assert "Read-only file system" in written


def test_a_descriptor_is_not_enough_to_be_shown_a_secret(broker: Broker, user: User) -> None:
    """Whoever hands it over has to be able to open it there, at that moment."""
    secret = broker.home / "secret"
    inner = secret / "inner"
    inner.mkdir(parents=True)
    os.chown(inner, users.USER, users.USER)
    user("kept = directory(path)", path=str(inner))
    secret.chmod(0o700)
    ask = """
message = wish(cwd=path)
message["start"]["spec"]["workdir"] = path
answer = send(message, [*streams(), kept])
"""
    assert "Permission denied" in refusal(user(ask, path=str(inner)))


def test_root_looks_for_a_kernels_files_with_the_users_eyes(broker: Broker, user: User) -> None:
    """What is behind a folder that the user may not enter is neither run, read nor shown."""
    secret = broker.home / "secret"
    (secret / "bin").mkdir(parents=True)
    (secret / "bin/python").symlink_to("/usr/bin/python3")
    (secret / "modules").mkdir()
    (secret / "modules/found.py").write_text("value = 'a secret'")
    (secret / "pip.conf").write_text("[global]\nindex-url = https://user:word@example.org/simple")
    secret.chmod(0o700)
    program = [f"{secret}/bin/python", "-c", "0"]
    told = refusal(user("answer = start(argv=argv)", argv=program))
    assert "there is no such program" in told
    look = f"""
import os
os.environ["PYTHONPATH"] += ":{secret}/modules"
kernel = Kernel(env_keep=["PYTHONPATH"])
answer = kernel("import os; print(os.path.exists('{secret}'))")
kernel.end()
"""
    assert user(look) == "False"
    extra = "answer = start(extra_files=[path])"
    told = user(extra, path=f"{secret}/modules")
    (record,) = broker.records()
    mounts = Path(f"/proc/{told['init'][0]}/mountinfo").read_text()
    assert str(secret) not in mounts
    question = "answer = send(dict(ask='close', sandbox_id=name), [])"
    assert user(question, name=record.parent.name)["story"]["kind"] == "asked"


def test_a_kernel_is_its_own_users_alone(broker: Broker, user: User, other: User) -> None:
    name = user("kernel = Kernel(); answer = kernel.manager.provisioner.handle.card()['id']")
    for ask in ("look", "signal", "kill", "close", "ready", "note", "find"):
        told = other("answer = send(dict(ask=ask, sandbox_id=name, signal=9), [])",
                     ask=ask, name=name)  # fmt: skip
        assert "it has ended, or was never this user's" in refusal(told)
    connect = """
made = socket.socket(socket.AF_UNIX)
try:
    answer = made.connect(path)
except OSError as error:
    answer = error.strerror
made.close()
"""
    path = f"{broker.runtime}/{name}/sockets/s-1"
    assert other(connect, path=path) == "Permission denied"
    assert user(connect, path=path) is None
    for path in (f"{broker.runtime}", f"{broker.runtime}/{name}/record.json"):
        with pytest.raises(Refused, match="PermissionError"):
            other("os.listdir(path) if os.path.isdir(path) else open(path)", path=path)
    assert user("answer = kernel.end()") == "exit"


def test_who_is_no_ordinary_user_is_refused(broker: Broker) -> None:
    for uid in (0, 0x70000000 + 1000):  # root, and a kernel
        with User(broker.home, uid) as stranger:
            stranger.sit_down(broker)
            told = refusal(stranger("answer = exchange(b'', [])"))
            assert "neither root nor a sandbox" in told


WRONG = """
import tempfile
read_end, write_end = os.pipe()
pair = socket.socketpair()
file = os.open(place["home"] + "/passwd", os.O_RDONLY)
link = os.open("/proc/self/exe", os.O_PATH | os.O_NOFOLLOW)
kinds = dict(pipe=read_end, socket=pair[0].fileno(), file=file, device=os.open("/dev/null", 2),
             memfd=os.memfd_create("x"), root=os.open("/", os.O_PATH), proc=directory("/proc"),
             tmp=directory("/tmp"), link=link, pidfd=os.pidfd_open(os.getpid()))
answer = {name: start([*streams(), fd]) for name, fd in kinds.items()}
"""


def test_what_is_no_work_directory_is_none_and_nothing_stays_open(
    broker: Broker, user: User
) -> None:
    user("answer = start([])")
    before = broker.descriptors()
    for name, told in user(WRONG).items():
        assert "work directory" in refusal(told), (name, told)
    many = "null = os.open('/dev/null', os.O_RDWR)\nanswer = start([null] * 253)"
    assert "too many descriptors" in refusal(user(many))
    for number in (0, 3, 5):
        told = refusal(user("answer = start([streams()[0]] * number)", number=number))
        assert f"{number} descriptors came for 4 places" in told
    assert are_closed(broker, before)
    assert not broker.records()


AHEAD = {
    "preload": [], "spares": 1, "idle_seconds": 60.0, "lonely_seconds": None, "alone": True,
    "waited_for": False,
}  # fmt: skip


@pytest.mark.parametrize("act", ["start-ready", "prepare", "fill"])
def test_nothing_is_made_ahead_in_what_is_no_work_directory_and_nothing_stays_open(
    broker: Broker, user: User, act: str
) -> None:
    user("answer = start([])")
    before = broker.descriptors()
    more = {"act": act, "ahead": AHEAD}
    ask = WRONG.replace("fd])", "fd], act=act, ahead=ahead)")
    for name, told in user(ask, **more).items():
        assert "made" not in told and "init" not in told, (name, told)
    many = (
        "null = os.open('/dev/null', os.O_RDWR)\nanswer = start([null] * 253, act=act, ahead=ahead)"
    )
    assert "too many descriptors" in refusal(user(many, **more))
    for number in (0, 3, 5):
        wrong = "answer = start([streams()[0]] * number, act=act, ahead=ahead)"
        told = refusal(user(wrong, number=number, **more))
        assert f"{number} descriptors came for 4 places" in told
    assert are_closed(broker, before)
    assert broker.nothing_is_left()


def test_descriptors_that_come_with_a_question_do_not_stay_open(broker: Broker, user: User) -> None:
    user("answer = start([])")
    before = broker.descriptors()
    code = """
null = os.open("/dev/null", os.O_RDWR)
asked = dict(ask=ask, sandbox_id="0" * 12, name="0" * 12)
answer = [send(asked, [null] * number) for number in (1, 30, 253)]
"""
    for ask in sorted(QUESTIONS):
        *few, many = user(code, ask=ask)
        assert all(few), ask  # an answer, or a refusal
        assert "too many descriptors" in refusal(many)
    assert are_closed(broker, before)


FLOOD = """
import struct
def connected():
    made = socket.socket(socket.AF_UNIX)
    made.connect(place["socket"])
    return made
many = [connected() for _ in range(200)]
for number, made in enumerate(many):
    texts = [b"", b"\\0", b"\\0\\1\\0\\0{", struct.pack(">I", 1 << 31), b"\\xff" * 64]
    try:
        made.send(texts[number % 5])
    except OSError:
        pass
answer = len(many)
"""
PIECES = """
text = frame(dict(ask="look", sandbox_id="0" * 12))
made = socket.socket(socket.AF_UNIX)
made.connect(place["socket"])
for byte in text:
    made.send(bytes([byte]))
answer = "never this user's" in made.recv(4096).decode('latin-1')
made.close()
"""


def test_a_flood_of_halves_takes_nothing_from_others(
    broker: Broker, user: User, other: User
) -> None:
    other("answer = start([])")
    before = broker.descriptors()
    for _ in range(5):  # a thousand in all
        assert user(FLOOD) == 200
        assert "0 descriptors came" in refusal(other("answer = start([])"))
        assert are_closed(broker, before)
    user("for made in many: made.close()")
    assert other(PIECES) is True


BAD = {
    "what came is no question": [
        b"\0\0\0\2{}", b"\0\0\0\2[]", b"\0\0\0\4null", b"\0\0\0\1{", b"\xff\xff\xff\xff",
        b"\0\0\x10\0" + b"[" * 4096,
    ],
    "what came is of version 2 of its language": [b"\0\0\0\x0d{\"version\":2}"],
}  # fmt: skip
FIELDS = {
    "sandbox_id": ["../../etc", "lock", "0" * 11, "0" * 13, "0" * 11 + "\n", 7, None],
    "argv": [[], "sh", ["./sh"], ["a\0b"], [1], ["x"] * 2000],
    "cwd": ["/", "relative", "/etc", "/\0"],
    "connection_file": [["../x", ""], ["a/b", ""], ["..", ""], ["x"], "x"],
    "umask": [-1, 0o1777, "022", 1.5],
    "logged": [["stdin"], "stdout"],
    "environment": [{"a=b": ""}, {"": ""}, {"a": 1}, {"a": "\0"}],
    "labels": [{"kind": "nursery"}, {"nursery": "x"}, {"name": "x" * 5000}, {"who": ""}],
    "spec": [{}, {"workdir": "/w", "confinement": "landlock"}, {"workdir": "/w", "uid": 0},
             {"workdir": "/w", "network": {"mode": "host"}}, {"workdir": "/w/../x"},
             {"workdir": "/w", "volumes": [{"source": "/proc/1", "target": "/x"}]},
             {"workdir": "/w", "limits": {"memory_bytes": 1e999}}],
    "uid": [0], "steps": [[]], "watched": [1], "extra_files": [["x"]],
}  # fmt: skip


def test_what_cannot_be_meant_is_refused_in_a_sentence(broker: Broker, user: User) -> None:
    before = broker.descriptors()
    for answer, texts in BAD.items():
        for text in texts:
            assert answer in refusal(user("answer = exchange(text, [])", text=text)), text
    for name, values in FIELDS.items():
        for value in values:
            if value == FIELDS["spec"][-1]:
                continue  # JSON has no such number, so a client cannot send it
            told = user("answer = start(**{name: value})", name=name, value=value)
            assert told["error"]["kind"] == "SpecError", (name, value, told)
    assert are_closed(broker, before)
    assert user("kernel = Kernel(); answer = kernel('print(7)'); kernel.end()") == "7"


LINGERS = """
import struct
listening = socket.create_server(("127.0.0.1", 0))
sends = socket.create_connection(listening.getsockname())
reads, _ = listening.accept()
sends.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("2i", 1, 600))
sends.setblocking(False)
with contextlib.suppress(BlockingIOError):
    while True:
        sends.send(bytes(1 << 16))
with socket.socket(socket.AF_UNIX) as made:
    made.connect(place["socket"])
    socket.send_fds(made, [text], [sends.fileno()])
os.close(sends.detach())
"""
IN_TIME = """
socket.setdefaulttimeout(60)
answer = send(dict(ask="list"), [])
socket.setdefaulttimeout(None)
"""


def test_a_broker_whose_words_nobody_reads_keeps_nobody_waiting(broker: Broker, user: User) -> None:
    ask = "answer = [start([*streams(), directory()], argv=[]) for _ in range(many)]"
    answers = [told["error"]["answer"] for told in user(ask, many=1500)]
    assert sum(map(len, answers)) > PIPE_BYTES
    assert user("kernel = Kernel(); answer = kernel('print(6 * 7)'); kernel.end()") == "42"
    heard = 0
    while heard < len(answers):  # others have been refused before
        heard += answers[0] in broker.heard("refusal")["text"]


def test_a_descriptor_that_does_not_close_keeps_no_other_user_waiting(
    broker: Broker, user: User, other: User
) -> None:
    before = broker.descriptors()
    for text in (b"x", b"\0\0\0\2{}", b"\xff\xff\xff\xff"):
        user(LINGERS, text=text)
        assert other(IN_TIME)["kernels"] == []
        user("reads.close(); listening.close()")
    assert are_closed(broker, before)
