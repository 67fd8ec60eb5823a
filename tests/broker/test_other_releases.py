"""A server whose package is of another release than the broker."""

from __future__ import annotations

import pytest
from brokers import Broker, Refused, User

from sandbox_provisioner.broker.frames import RELEASE, VERSION

pytestmark = pytest.mark.requires("root", "userns", "setpriv", "public-python")

# The server's own package, as another release has it.
ASK = """
from sandbox_provisioner.broker import frames, talk
usual = frames.VERSION, talk.VERSION, frames.RELEASE
frames.VERSION = talk.VERSION = version
frames.RELEASE = release
try:
    talk.ask_now(place["socket"], {"ask": "list", **more}, 30)
finally:
    frames.VERSION, talk.VERSION, frames.RELEASE = usual
"""


@pytest.mark.parametrize(
    ("version", "older"), [(VERSION + 1, "sandbox broker"), (VERSION - 1, "this server")]
)
def test_who_speaks_another_version_is_told_which_of_the_two_is_older(
    broker: Broker, user: User, version: int, older: str
) -> None:
    with pytest.raises(Refused) as caught:
        user(ASK, version=version, release=RELEASE, more={})
    assert f"speaks version {VERSION} of its language, and this server version" in str(caught.value)
    assert older in str(caught.value).partition("this server version")[2]
    # The broker has said so, too, in its log.
    told = broker.heard("refusal")["text"]
    assert f"what came is of version {version}" in told
    assert ("the broker is of an older" if version > VERSION else "who asks is of an older") in told


def test_what_only_another_release_says_is_refused_with_both(broker: Broker, user: User) -> None:
    with pytest.raises(Refused, match=r"'colour'; who asks is of release 9\.9, and the broker of"):
        user(ASK, version=VERSION, release="9.9", more={"colour": "red"})
    with pytest.raises(Refused, match="its client may be of another version"):
        user(ASK, version=VERSION, release=RELEASE, more={"colour": "red"})
