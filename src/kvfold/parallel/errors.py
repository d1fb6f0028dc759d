"""What is raised when ranks do not agree, or one does not answer."""

from __future__ import annotations


class RankError(RuntimeError):
    """Another rank did not answer, or called with other arguments. Nothing that was to come of it has been written."""
