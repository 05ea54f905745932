"""Means: Ray sessions, worker pools, committed storage. This package knows machines but not faces."""
