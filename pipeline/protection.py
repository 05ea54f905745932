"""What protects a run on disk: private folders, tables that may be encrypted, no core dumps (docs/security.md)."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.encrypted_parts import Cipher
from cluster.keys import named, no_core_dumps
from cluster.storage import Store

if TYPE_CHECKING:
    from pipeline.config import AuditConfig

log = logging.getLogger(__name__)

IN_CLEAR = (
    "report.html",
    "findings.csv",
    "findings.parquet",
    "changes.csv",
    "changes.parquet",
    "figures/",
    "summary.json",
    "run.json",
    "unveil.log",
    "public/",
    "public_ids.parquet",
    "audience.key",
    "export/",
    "review/",
    "clean/*.csv",
    "clean/manifest.parquet",
    "clean/release/",
)
"""What stays readable where tables are encrypted: it is made for people, or for other programs."""


def stores(config: "AuditConfig") -> tuple[Store, Store]:
    """Where the tables of a run are kept, and where its embeddings are."""
    folder, reference = Path(config.out), config.encryption.key
    place = config.store or folder / "store"
    cipher = Cipher.at(folder, reference)
    return Store(folder, cipher), Store(place, cipher.covering(place)).child("embeddings")


def protect(store: Store, embeddings: Store) -> None:
    """Before anything is written: leave no core dumps, here and in what this process starts, and have the key ready.

    Raises
    ------
    EncryptionError
        If there is no key where one is needed, or it is another one (`Cipher.make_key`).
    """
    no_core_dumps()
    store.make_key()
    if "://" not in embeddings.address or (embeddings.cipher is not None and embeddings.cipher.on):
        embeddings.make_key()  # elsewhere it is asked for by embed, so that other verbs need no network
    if store.cipher is not None and store.cipher.on:
        log.info(
            "encryption: tables are encrypted (%s); in clear stay %s",
            named(store.cipher.reference),
            ", ".join(IN_CLEAR),
        )
