"""Processes that work together: a group with its primitives, and each process's share of the data."""

from nullspace.distributed.job import Job
from nullspace.errors import RankLost

__all__ = ["Job", "RankLost"]
