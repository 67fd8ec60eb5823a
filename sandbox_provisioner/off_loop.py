"""off_loop.py - any process outside: what may block, in threads beside the event loop; and turns on
it.

A server's loop serves all its users. Files of /proc, of cgroups and of a runtime directory may take
long where the machine is busy or short of memory; no event tells when they would not.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, Queue
from typing import TypeVar, cast

from sandbox_provisioner.descriptors import keep_from_children

_Value = TypeVar("_Value")
# They wait more than they compute; more of them would only keep the interpreter from the loop.
_THREADS = 4
_AGAIN_SECONDS = 0.5


class _Pool:
    """A few threads for all event loops of this process: jupyter_client's blocking managers bring a
    new loop with every call, whose own executor would start its threads anew."""

    def __init__(self) -> None:
        self.forget()
        keep_from_children(self)

    def forget(self) -> None:
        """In a child that was forked there are no threads."""
        self.executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="sandbox")


_pool = _Pool()


def widen(threads: int) -> None:
    """Before anything has been called: for who serves many people, one of whom may have some of the
    threads wait."""
    _pool.executor = ThreadPoolExecutor(threads, thread_name_prefix="sandbox")


@dataclass(slots=True)
class _Places:
    """Those of one event loop, and how many have one or wait for one."""

    free: asyncio.Semaphore
    users: int = 0


class Gate:
    """Lets so many pass at a time on each event loop, in the order in which they came."""

    def __init__(self, places: int, seconds: float | None = None) -> None:
        """Who is not through after *seconds* makes room for the next one all the same."""
        self._number = places
        self._seconds = seconds
        self._places: dict[asyncio.AbstractEventLoop, _Places] = {}

    @contextlib.asynccontextmanager
    async def passed(self) -> AsyncIterator[None]:
        """Have one of the places meanwhile."""
        loop = asyncio.get_running_loop()
        places = self._places.setdefault(loop, _Places(asyncio.Semaphore(self._number)))
        places.users += 1
        try:
            await places.free.acquire()
            taken = [places.free]
            try:
                with self._timer(loop, taken):
                    yield
            finally:
                _make_room(taken)
        finally:
            places.users -= 1
            if not places.users:
                del self._places[loop]  # blocking managers bring a new loop with every call

    @contextlib.contextmanager
    def _timer(
        self, loop: asyncio.AbstractEventLoop, taken: list[asyncio.Semaphore]
    ) -> Iterator[None]:
        if self._seconds is None:
            yield
            return
        timer = loop.call_later(self._seconds, _make_room, taken)
        try:
            yield
        finally:
            timer.cancel()


def _make_room(taken: list[asyncio.Semaphore]) -> None:
    """Once only: a place that was given up is somebody else's."""
    while taken:
        taken.pop().release()


_turn = Gate(1)


@contextlib.asynccontextmanager
async def one_after_another() -> AsyncIterator[None]:
    """Let what computes on the loop for some milliseconds be done by one at a time.

    A loop does all that is ready before it looks for anything else: the beginnings of sixty starts
    at once would be one long silence for everybody who is served.
    """
    async with _turn.passed():
        await asyncio.sleep(0)  # those who come now wait for us
        yield


async def off_loop(function: Callable[..., _Value], *arguments: object) -> _Value:
    """What *function* returns or raises, called in a thread.

    Who is cancelled meanwhile gets to know it when *function* has returned: what it has made can be
    undone only then.
    """
    future = _begun(lambda: function(*arguments))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # or it would be logged as one that nobody has seen
        raise


def apart(call: Callable[[], object]) -> asyncio.Future[None]:
    """Begin *call* in a thread of its own, and be done when it has ended, which may be never: so it
    takes no thread from others, and the end of the process does not wait for it either."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if not done.done():
            done.set_result(None)

    def run() -> None:
        try:
            call()
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended before
                loop.call_soon_threadsafe(tell)

    def begin() -> None:
        try:
            threading.Thread(target=run, name="sandbox-apart", daemon=True).start()
        except RuntimeError:  # there is none to be had just now
            loop.call_later(_AGAIN_SECONDS, begin)

    begin()
    return done


def within(seconds: float, call: Callable[[], _Value], undo: Callable[[_Value], object]) -> _Value:
    """What *call* returns or raises, called in a thread of its own; TimeoutError after *seconds*.
    What it returns later is undone: nobody can be kept from waiting for a file server."""
    found: Queue[tuple[_Value | None, BaseException | None]] = Queue(1)
    lock, is_late = threading.Lock(), False

    def run() -> None:
        try:
            value = call()
        except BaseException as error:
            found.put((None, error))
            return
        with lock:
            if not is_late:
                found.put((value, None))
                return
        undo(value)

    threading.Thread(target=run, name="sandbox-within", daemon=True).start()
    try:
        result, error = found.get(timeout=seconds)
    except Empty:
        with lock:
            is_late = True
            if found.empty():
                raise TimeoutError from None
            result, error = found.get()
    if error:
        raise error
    return cast(_Value, result)


def _begun(call: Callable[[], _Value]) -> asyncio.Future[_Value]:
    loop = asyncio.get_running_loop()
    try:
        return loop.run_in_executor(_pool.executor, call)
    except RuntimeError:
        # Who ends a kernel in a callback of atexit (`jupyter run`) finds that no thread takes
        # anything any more (concurrent.futures). Then nobody else waits for the loop.
        if threading.current_thread() is not threading.main_thread():
            raise
    future = loop.create_future()
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)
    return future
