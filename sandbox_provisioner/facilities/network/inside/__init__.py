"""inside - runs in PID 1: the network that a sandbox has.

May import: errno, os, inside.kernel_calls, wire; channel.
May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

import errno
import os

from sandbox_provisioner.facilities.network.inside.channel import Channel
from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside import wire

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from sandbox_provisioner.inside.box import Box

# As many may wait as Linux allows (net.core.somaxconn): whoever accepts them may be busy.
_BACKLOG = 4096


class Network:
    """Sockets that listen for whoever is outside, by their names; the channel to that one, which
    ends when either of us does; and who waits for what is said there."""

    def __init__(self) -> None:
        self.listeners: list[tuple[str, int]] = []
        self.channel_fd = -1
        self.watch: Channel | None = None


def loopback_up(_box: Box) -> None:
    """Without it, a debugger inside hangs the kernel for good: debugpy connects to 127.0.0.1."""
    kernel.loopback_up()


def netlink(_box: Box, protocol: str, messages: str, *names: str) -> None:
    """Tell Linux *messages*, which are called *names*, of a network that is ours."""
    kernel.tell_netlink(int(protocol), os.fsencode(messages), names)


def listen(box: Box, *names: str) -> None:
    """Each "KIND:PORT", at every address: who else is asked is asked here."""
    for name in names:
        kind, _, port = name.partition(":")
        fd = kernel.new_listener(kind, int(port), _BACKLOG)
        box.part(Network).listeners.append((kind, fd))


def hand_out_listeners(box: Box) -> None:
    """To the gateway, which has them from here on; what it dials is not ours to know."""
    network = box.part(Network)
    network.channel_fd = _channel(box)
    names, fds = zip(*network.listeners, strict=True)
    kernel.send_descriptors(network.channel_fd, wire.message(wire.LISTENERS, *names), list(fds))
    for fd in fds:
        os.close(fd)
    network.listeners.clear()
    network.watch = Channel(network.channel_fd, is_network=True)


def await_card(box: Box) -> None:
    """Let who may make interfaces put one into our network, and wait for it."""
    network = box.part(Network)
    network.channel_fd = _channel(box)
    own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    kernel.send_descriptors(network.channel_fd, wire.message(wire.NETNS), [own])
    os.close(own)
    word, text = wire.parts(os.read(network.channel_fd, wire.LONGEST))
    if word != wire.UP:
        raise OSError(errno.ENETDOWN, text or "who makes network cards has ended")
    network.watch = Channel(network.channel_fd, is_network=False)


def _channel(box: Box) -> int:
    """What was given to us for it."""
    if not (found := box.named.get(wire.NETWORK)):
        raise OSError(errno.ENOTCONN, "nobody was there to dial for this box")
    return found[0]


VERBS = (loopback_up, netlink, listen, hand_out_listeners, await_card)
