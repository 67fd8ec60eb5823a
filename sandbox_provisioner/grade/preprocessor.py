"""grade/preprocessor.py - in nbgrader's own command: its preprocessor Execute, with boxes.

``nbgrader autograde`` runs each notebook by the preprocessors that its configuration names. This
one takes the place of `nbgrader.preprocessors.Execute`, with the same options and those below.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from jupyter_core.utils import run_sync
from nbformat import NotebookNode
from nbgrader.preprocessors import Execute
from traitlets import Integer, Unicode

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.grade.copies import copy
from sandbox_provisioner.grade.kernels import Boxing
from sandbox_provisioner.grade.run import run_notebook
from sandbox_provisioner.grade.terms import Terms
from sandbox_provisioner.units import parse_bytes

_NAME = "sandbox_provisioner.grade.preprocessor.SandboxExecute"
_NBGRADERS = "nbgrader.preprocessors.{}"
#: For ``c.Autograde.autograde_preprocessors``: nbgrader's own list, with this one in its place.
AUTOGRADE = [
    _NAME,
    *map(_NBGRADERS.format, ("IgnorePattern",)),
    "nbconvert.preprocessors.ClearMetadataPreprocessor",
    *map(_NBGRADERS.format, ("LimitOutput", "SaveAutoGrades", "AssignLatePenalties")),
    _NBGRADERS.format("CheckCellMetadata"),
]


class SandboxExecute(Execute):
    """Runs each notebook in a box of its own, and graded it is however that ends."""

    total_timeout = Integer(
        600, help="How many seconds all cells of a notebook may take together; 0 is no limit."
    ).tag(config=True)
    shown_limit = Unicode("256K", help="How much of what a cell shows is kept.").tag(config=True)
    output_limit = Unicode(
        "64M", help="A notebook whose cells show more than that together is stopped."
    ).tag(config=True)

    def preprocess(
        self, nb: NotebookNode, resources: Any, km: Any = None
    ) -> tuple[NotebookNode, Any]:
        """Called for each notebook, with the names of the submission's files in *resources*."""
        name = self.kernel_name or nb.metadata.get("kernelspec", {}).get("name") or "python3"
        boxing = Boxing(name=name, config=self.config)
        with tempfile.TemporaryDirectory(prefix="sandbox-grade-") as folder:
            files = Path(folder, "files")
            self._copy_to(files, resources)
            verdict = run_sync(run_notebook)(
                nb, boxing, files, self._terms(), seconds_of=self.timeout_func
            )
        if verdict:
            marks = resources.get("nbgrader", {})
            self.log.warning("%s of %s: %s", marks.get("notebook"), marks.get("student"), verdict)
        return nb, resources

    def _copy_to(self, files: Path, resources: Any) -> None:
        """The submission's files, and the assignment's over them: from where they were handed in,
        since nbgrader's own copy has followed links."""
        marks, converter = resources["nbgrader"], self.parent.parent
        place, name = converter.coursedir, marks["assignment"]
        submitted = Path(place.format_path(place.submitted_directory, marks["student"], name))
        if submitted.joinpath(f"{marks['notebook']}.ipynb").is_symlink():
            raise SpecError(
                attempt=f"grade {marks['notebook']} of {marks['student']}",
                answer="it is a symbolic link: nobody knows whose notebook nbgrader has read",
                remedy="Ask for it again, or mark it by hand.",
            )
        ignored = [*place.ignore, "*.ipynb"]
        copy(submitted, files, ignored)
        source = Path(place.format_path(place.source_directory, ".", name))
        if source.is_dir():
            copy(source, files, ignored, converter.exclude_overwriting.get(name, []))

    def _terms(self) -> Terms:
        return Terms(
            cell_seconds=self.timeout or None,
            total_seconds=self.total_timeout or None,
            shown_bytes=parse_bytes("shown_limit", self.shown_limit),
            said_bytes=parse_bytes("output_limit", self.output_limit),
        )
