"""The faults of machines and storage.

ClusterError
├── StorageError      a place cannot be written or read
└── IncompleteTable   a table has no commit marker, or its bytes are not the committed ones

Messages name the place, the rule and the next step.
"""


class ClusterError(Exception):
    """The machines or their storage cannot do what was asked."""


class StorageError(ClusterError):
    """A place cannot be written or read."""


class IncompleteTable(ClusterError):
    """A table has no commit marker, or its bytes are not the committed ones."""
