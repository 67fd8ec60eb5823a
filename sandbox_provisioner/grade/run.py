"""grade/run.py - whoever grades: runs the cells of one notebook in a kernel of its own.

nbclient speaks with the kernel. Ours are the limits, what becomes of a kernel that they end, and a
check before the tests: code that has to fail. Where it does not, failures of tests would not be
told either. It catches what replaces code on its way, and not what knows of it (docs/nbgrader.md).
"""

from __future__ import annotations

import asyncio
import secrets
import subprocess
from pathlib import Path
from typing import Any

import nbformat
from jupyter_core.utils import ensure_async
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode, v4

from sandbox_provisioner.grade import verdict
from sandbox_provisioner.grade.kernels import BoxedManager, Boxing, environment
from sandbox_provisioner.grade.shown import Budget, weight
from sandbox_provisioner.grade.terms import SecondsOf, Terms, setting_up
from sandbox_provisioner.grade.verdict import Place
from sandbox_provisioner.inside.printable import one_line

_HEED_SECONDS = 3.0
_READY_SECONDS = 60
_LATE = {"ename": "CellTimeoutError", "evalue": "", "traceback": ["No reply before the time limit"]}
_LONGEST_ERROR = 200


async def run_notebook(
    notebook: NotebookNode,
    boxing: Boxing,
    files: Path,
    terms: Terms,
    *,
    seconds_of: SecondsOf | None = None,
) -> str:
    """Run all cells of *notebook*, whose outputs are written into it, and return the verdict: ""
    where all of it ran. *files* are the submission's; *seconds_of* tells the time of each cell
    where it is not the *terms*'. Raises a SandboxError, or what jupyter_client raises, where there
    is no kernel to be had."""
    run = _Run(notebook, boxing.manager(files), terms)
    run.timeout_func = seconds_of
    return await run.to_the_end()


class _Stopped(Exception):
    """The submission is not run any further."""


class _Run(NotebookClient):
    """One notebook's cells."""

    def __init__(self, notebook: NotebookNode, manager: BoxedManager, terms: Terms) -> None:
        # With a file of its history named, each kernel would have to make its shell anew.
        super().__init__(
            notebook, km=manager, timeout=terms.cell_seconds or -1, allow_errors=True,
            raise_on_iopub_timeout=True, iopub_timeout=_READY_SECONDS,
            startup_timeout=_READY_SECONDS, ipython_hist_file="",
            store_widget_state=False, shutdown_kernel="immediate",
            # A submission may tag the tests in it: overwritten is what they say, not their tags.
            skip_cells_with_tag=secrets.token_hex(),
        )  # fmt: skip
        self._manager = manager
        self._terms = terms
        self._said_bytes = 0
        self._budget = Budget(terms.shown_bytes)
        self._why = ""
        self._verdict = ""
        self._place = Place(1)

    # -- from the start to the end

    async def to_the_end(self) -> str:
        """Run all of it; the verdict."""
        self.reset_execution_trackers()
        end_of_time = None
        try:
            await self._start()
            if seconds := self._terms.total_seconds:
                loop = asyncio.get_running_loop()
                end_of_time = loop.call_later(seconds, self._stop, verdict.total_time(seconds))
            await self._cells()
        except (DeadKernelError, _Stopped):
            await self._stopped_by(self._why)
        finally:
            if end_of_time:
                end_of_time.cancel()
            await self._async_cleanup_kernel()
        return self._verdict

    async def _start(self) -> None:
        # What it writes there would be in the terminal of who grades.
        nowhere = subprocess.DEVNULL
        await self.async_start_new_kernel(env=environment(), stdout=nowhere, stderr=nowhere)
        await self.async_start_new_kernel_client()
        assert self.kc is not None
        made = self.kc.execute(setting_up(), silent=True, store_history=False)
        reply = await self.async_wait_for_reply(await ensure_async(made))
        if not reply or reply["content"].get("status") != "ok":
            self._why = "the files of the submission do not fit into its box"
            raise _Stopped

    async def _cells(self) -> None:
        for index, cell in enumerate(self.nb.cells):
            if cell.cell_type != "code":
                continue
            self._place = place_of(cell, index)
            try:
                honest = not is_test(cell) or await self._tells_failures(index)
                await self._cell(cell, index)
            except (DeadKernelError, _Stopped, asyncio.CancelledError):
                raise
            except Exception as error:  # it said what no kernel says
                self._why = self._why or _unheard(error)
                raise _Stopped from None
            if not honest:
                self._verdict = self._verdict or verdict.tampered(self._place)
                cell.outputs.append(_told("Tampered", verdict.tampered(self._place)))
            _check_outputs(cell)

    async def _cell(self, cell: NotebookNode, index: int) -> None:
        self._budget = Budget(self._terms.shown_bytes)
        await self.async_execute_cell(cell, index, execution_count=self.code_cells_executed + 1)
        if self._why:
            raise _Stopped

    async def _tells_failures(self, index: int) -> bool:
        """Whether the kernel tells of code that has to fail that it failed; no name changes."""
        one = secrets.randbelow(10**6)
        cell = v4.new_code_cell(f"assert {one} == {one + 1 + secrets.randbelow(10**6)}")
        known = self.nb.cells[index], self.code_cells_executed
        try:
            await self.async_execute_cell(cell, index, store_history=False)
        finally:
            self.nb.cells[index], self.code_cells_executed = known
        return any(output.get("ename") == "AssertionError" for output in cell.outputs)

    # -- what stops it

    def _stop(self, why: str) -> None:
        """From wherever in the loop: nothing of this kernel is waited for any more."""
        self._why = self._why or why
        if self.task_poll_for_reply:
            self.task_poll_for_reply.cancel()

    async def _stopped_by(self, why: str) -> None:
        task = asyncio.current_task()
        if task and task.cancelling():  # nbclient takes that for the kernel's end
            raise asyncio.CancelledError
        if not why:
            await ensure_async(self._manager.is_alive())  # which hears how it ended
            why = verdict.cap_that_bit(self._manager.end())
        text = verdict.stopped(why, self._place)
        mark_stopped(self.nb, self._place.number - 1, text)
        self._verdict = text

    async def _async_handle_timeout(
        self, timeout: int, cell: NotebookNode | None = None
    ) -> dict[str, Any] | None:
        """Called when a cell has had its time: it is interrupted, and the next one has its turn."""
        await ensure_async(self._manager.interrupt_kernel())
        assert self.kc is not None
        try:
            async with asyncio.timeout(_HEED_SECONDS):
                while True:
                    told = await ensure_async(self.kc.shell_channel.get_msg())
                    if told["msg_type"] == "execute_reply":
                        break
        except TimeoutError:
            self._why = verdict.cell_time(timeout)
            raise _Stopped from None
        return {"content": {**_LATE, "status": "error"}}

    # -- what it says

    def process_message(
        self, msg: dict[str, Any], cell: NotebookNode, cell_index: int
    ) -> NotebookNode | None:
        """Called for each message that belongs to *cell*."""
        if msg["msg_type"] == "status":
            return super().process_message(msg, cell, cell_index)
        size = weight(msg)
        self._said_bytes += size
        if self._said_bytes > self._terms.said_bytes:
            self._stop(verdict.said_too_much(self._terms.said_bytes))
            return None
        admitted = self._budget.admitted(msg, size)
        return super().process_message(admitted, cell, cell_index) if admitted else None


def place_of(cell: NotebookNode, index: int) -> Place:
    """As people find it."""
    name = cell.metadata.get("nbgrader", {}).get("grade_id", "")
    return Place(index + 1, str(name))


def is_test(cell: NotebookNode) -> bool:
    """Whether *cell* is one of nbgrader's whose outcome is a mark."""
    marks = cell.metadata.get("nbgrader", {})
    return bool(marks.get("grade")) and not marks.get("solution")


def mark_stopped(notebook: NotebookNode, index: int, text: str) -> None:
    """Tell at the cell *index* and at those after it, which have not run: nothing there counts."""
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and number >= index:
            told = text if number == index else f"not run: the submission was {text}"
            cell.outputs = [*(cell.outputs if number == index else ()), _told("Stopped", told)]


def _told(name: str, text: str) -> NotebookNode:
    return v4.new_output("error", ename=name, evalue=text, traceback=[f"{name}: {text}"])


def _check_outputs(cell: NotebookNode) -> None:
    """A kernel may have forged its messages: what is no output of a notebook is taken out, and an
    error in its place."""
    try:
        for output in cell.outputs:
            nbformat.validate(output, ref="output", version=4)
        v4.writes(v4.new_notebook(cells=[cell])).encode()
    except (nbformat.ValidationError, ValueError, TypeError, RecursionError, AttributeError):
        cell.outputs = [_told("Output", "what its kernel said was no output of a notebook")]


def _unheard(error: Exception) -> str:
    if isinstance(error, CellTimeoutError):
        return "a message of its kernel's was too large, or never came"
    text = one_line(f"{type(error).__name__}: {error}")[:_LONGEST_ERROR]
    return f"its kernel said what no kernel says ({text})"
