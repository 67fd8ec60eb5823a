"""made_up_projects.py - in the test process: what real files would have of projects.

It stands in for `kernel_calls`, where no file system of the machine counts by projects.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

CALLS = (
    "project_of",
    "set_project",
    "project_quota",
    "limit_project",
    "next_project",
    "enforces_projects",
)


@dataclass
class Projects:
    """What the real files of a test's folder have of projects, by inodes."""

    projects: dict[int, tuple[int, bool]] = field(default_factory=dict)
    limits: dict[int, tuple[int, int]] = field(default_factory=dict)
    used_bytes: int = 5
    enforced: bool = True

    def enforces_projects(self, fd):
        return self.enforced

    def project_of(self, fd):
        return self.projects.get(os.fstat(fd).st_ino, (0, False))

    def set_project(self, fd, project, *, inherit):
        self.projects[os.fstat(fd).st_ino] = project, inherit

    def project_quota(self, fd, project):
        return *self.limits.get(project, (0, 0)), self.used_bytes, 1

    def limit_project(self, fd, project, size_bytes, inodes):
        old = self.limits.get(project, (0, 0))
        new = zip((size_bytes, inodes), old, strict=True)
        self.limits[project] = tuple(was if value is None else value for value, was in new)

    def next_project(self, fd, project):
        known = {number for number, _ in self.projects.values()} | set(self.limits)
        return min((number for number in known if number >= project), default=-1)

    def of(self, path):
        return self.projects.get(os.lstat(path).st_ino, (0, False))
