"""The faults that a user can act on.

AuditError
├── ConfigError       a configuration key or value is wrong
├── FormatError       a set cannot be read in the form in which it was declared
├── ModelError        a model file is missing, altered, or does not do what was declared
├── SchemaMismatch    a table does not follow its contract
├── CapacityError     the work does not fit a stated limit
├── DeviceError       a device computes less exactly than the search proves with
└── ScoreError        scores of persons from which nothing can be computed (also a ValueError)

Every message names the thing, the rule, the value and the next step. Faults of machines and storage have their own
root, `cluster.faults.ClusterError`, because `cluster` and `operators` must not import each other; the command line
catches both.
"""


class AuditError(Exception):
    """The audit cannot go on for a reason that the user can mend."""


class ConfigError(AuditError):
    """A configuration key or value is wrong."""


class FormatError(AuditError):
    """A set cannot be read in the form in which it was declared."""


class ModelError(AuditError):
    """A model file is missing, altered, or does not do what was declared."""


class SchemaMismatch(AuditError):
    """A table does not follow its contract."""


class CapacityError(AuditError):
    """The work does not fit a stated limit."""


class DeviceError(AuditError):
    """A device computes less exactly than the search proves with."""


class ScoreError(AuditError, ValueError):
    """Scores of persons from which nothing can be computed: none at all, or not finite."""
