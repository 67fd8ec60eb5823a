"""rooms.py - anywhere: imports all files that fill the table."""

import calls  # noqa: F401
import deputy  # noqa: F401
import files  # noqa: F401
import floods  # noqa: F401
import gateway  # noqa: F401
import homes  # noqa: F401
import layers  # noqa: F401
import left_behind  # noqa: F401
import limits  # noqa: F401
import network  # noqa: F401
import other_roots  # noqa: F401
import processes  # noqa: F401
import reaching  # noqa: F401
import repositories  # noqa: F401
import reviewed  # noqa: F401
import trusted  # noqa: F401
