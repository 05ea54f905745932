"""The audit: order of stages, configuration, ledger, command line. Read `pipeline/audit.py` first."""

__version__ = "0.1.0"
