"""The faults of machines and storage.

ClusterError
├── StorageError      a place cannot be written or read
│   └── EncryptionError   its key is missing, is another one, or tables are encrypted where they must not be, or not
├── IncompleteTable   a table has no commit marker, or its bytes are not the committed ones
├── FolderInUse       another process works in a folder that takes one at a time
└── UnlikeNodes       a machine of the cluster has other code, or does not see the shared folders

Messages name the place, the rule and the next step.
"""


class ClusterError(Exception):
    """The machines or their storage cannot do what was asked."""


class StorageError(ClusterError):
    """A place cannot be written or read."""


class EncryptionError(StorageError):
    """The key of a place is missing or another one, or its tables are encrypted and must not be, or the other way."""


class IncompleteTable(ClusterError):
    """A table has no commit marker, or its bytes are not the committed ones."""


class FolderInUse(ClusterError):
    """Another process works in a folder that takes one at a time."""


class UnlikeNodes(ClusterError):
    """A machine of the cluster has other code than the driver, or does not see the shared folders."""
