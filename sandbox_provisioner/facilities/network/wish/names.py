"""names.py - any process outside, and the gateway; pure: host names, in the one form that counts.

That form is what DNS compares: ASCII, in lower case, without the dot at the end.
"""

from __future__ import annotations

import re
import unicodedata

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
# What ends so is an address to inet_aton(3), and to the URL standard ("ends in a number"):
# "2130706433", "0x7f.1" and "0177.0.0.1" are all 127.0.0.1.
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")
_LONGEST = 253  # RFC 1035, 3.1, without the dot at the end
_OF_LETTERS = ("L", "M", "Nd")


class BadNameError(ValueError):
    """A text that is no host name; its own text is why not."""


def host_name(text: str) -> str:
    """*text*, which a program asked for, in the form that counts; BadNameError."""
    # First, since "\N{KELVIN SIGN}".lower() is "k".
    if not text.isascii():
        raise BadNameError("it has characters that DNS does not know")
    name = text.lower().removesuffix(".")
    labels = name.split(".")
    if len(name) > _LONGEST:
        raise BadNameError(f"a host name has at most {_LONGEST} characters")
    for label in labels:
        if not _LABEL.fullmatch(label):
            raise BadNameError(f"{label!r} cannot be a part of a host name")
    if _NUMBER.fullmatch(labels[-1]):
        raise BadNameError("what ends in a number is an address, written in an unusual way")
    if labels[-1] == "localhost":
        raise BadNameError("inside a sandbox that is the sandbox itself")
    return name


def written_name(text: str) -> str:
    """*text*, which a person wrote, in the form that counts: letters beyond ASCII become what a
    look-up sends for them; BadNameError."""
    plain = unicodedata.normalize("NFC", text).lower()
    if plain.isascii():
        return host_name(plain)
    if unicodedata.normalize("NFKC", plain) != plain:
        raise BadNameError("it has characters that are another one's variant")
    return host_name(".".join(map(_as_sent, plain.split("."))))


def _as_sent(label: str) -> str:
    """RFC 5891, 4.4. Python's own codec "idna" follows RFC 3490, and makes "ss" of a sharp s: that
    is somebody else's name."""
    if label.isascii():
        return label
    for character in label:
        if character != "-" and not unicodedata.category(character).startswith(_OF_LETTERS):
            raise BadNameError(f"{character!r} cannot be a part of a host name")
    return "xn--" + label.encode("punycode").decode("ascii")
