"""inside/printable.py - pure; in PID 1 and outside: text that a terminal and a log show as text.

What a kernel writes, and the names that it gives to files, may hold control characters: they move
a terminal's cursor, set its title, or answer for the person at it (ECMA-48 calls them C0 and C1);
others turn the order of the letters around (Unicode's bidirectional controls). May import: nothing.
"""

from __future__ import annotations

_NEW_LINE = 0x0A
_TAB = 0x09
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0))
# ALM, LRM, RLM; line and paragraph separator; LRE to RLO; LRI to PDI.
_OF_UNICODE = (0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_SHOWN_PLACES = 5
_NAMES = {code: f"\\x{code:02x}" for code in _CONTROLS}
_NAMES |= {code: f"\\u{code:04x}" for code in _OF_UNICODE}
_IN_A_LINE = dict(_NAMES)
_IN_LINES = {code: name for code, name in _NAMES.items() if code not in (_NEW_LINE, _TAB)}


def printable(text: str) -> str:
    """*text* with every control character as its number, but for tabs and the ends of lines."""
    return _encodable(text).translate(_IN_LINES)


def one_line(text: str) -> str:
    """The same in one line: a name with an end of line in it cannot look like a line of a log."""
    return _encodable(text).translate(_IN_A_LINE)


def printable_bytes(data: bytes) -> bytes:
    """`printable` for UTF-8; what is none is shown as its numbers."""
    return data.decode("utf-8", "backslashreplace").translate(_IN_LINES).encode()


def with_place(error: BaseException) -> str:
    """*error* in one line, with the last lines of code that it came through: what somebody needs to
    mend it who was not there."""
    places, trace = [], error.__traceback__
    while trace:
        path = trace.tb_frame.f_code.co_filename
        places.append(f"{path.rpartition('/sandbox_provisioner/')[2]}:{trace.tb_lineno}")
        trace = trace.tb_next
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return one_line(f"{text} (at {' > '.join(places[-_SHOWN_PLACES:])})" if places else text)


def whole_letters(data: bytes) -> tuple[bytes, bytes]:
    """*data* up to its last letter that is whole in UTF-8, and the beginning of one after it."""
    for length in range(1, min(len(data), 3) + 1):
        byte = data[-length]
        if byte >= 0xC0:  # the first of two, three or four
            is_whole = length >= 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return (data, b"") if is_whole else (data[:-length], data[-length:])
        if byte < 0x80:
            break
    return data, b""


def _encodable(text: str) -> str:
    """Surrogates, which stand for bytes of a name that are not UTF-8, fail on their way out."""
    return text.encode("utf-8", "backslashreplace").decode()
