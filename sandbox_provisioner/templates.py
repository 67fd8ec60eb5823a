"""templates.py - in the Jupyter server, or nbconvert: its templates are programs.

nbconvert looks for each of its templates in the current directory first, and Jinja runs what it
finds, with all rights: a kernel that works there could leave a ``lab/index.html.j2`` for the next
export. So whoever exports from a process that starts sandboxed kernels, or has our contents
manager, gets installed templates only, unless its configuration names other places.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from jupyter_core.paths import jupyter_path

_OPTION = "extra_template_basedirs"


def keep_templates_out(configurable: Any) -> None:
    """Set nbconvert's option in the configuration of the application that *configurable* belongs
    to; it is read when somebody exports."""
    while getattr(configurable, "parent", None) is not None:
        configurable = configurable.parent
    config = configurable.config
    if _OPTION not in config.TemplateExporter:
        config.TemplateExporter[_OPTION] = []


def template_places(cwd: str) -> tuple[str, ...]:
    """Where nbconvert itself, if that is what runs here, would find templates in *cwd*: it has read
    its configuration already."""
    module = sys.modules.get("nbconvert.nbconvertapp")
    if module is None or not module.NbConvertApp.initialized():
        return ()
    names: set[str] = set()
    for folder in filter(os.path.isdir, jupyter_path("nbconvert", "templates")):
        names |= set(os.listdir(folder))
    return tuple(sorted(os.path.join(cwd, name) for name in names))
