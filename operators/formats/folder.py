"""Image folders: `<identity>/<image>.jpg`, deeper nestings, or flat.

Links are followed only inside the set's folder: a link that leaves it could make the audit read and show any file of
the machine.
"""

import os
from collections import Counter
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path, PurePosixPath

from operators.errors import FormatError
from operators.formats.listing import Entry, Listing

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".pgm"})


def listing(uri: str, identity: str) -> Listing:
    """All image files below the folder `uri`.

    Parameters
    ----------
    uri
        The set's folder.
    identity
        `parent`: the label is the folder that holds the image, relative to the set, and null for images at the top;
        `none`: no labels.

    Raises
    ------
    FormatError
        If the folder is missing, is not a folder, or holds no image file.
    """
    root = Path(uri)
    if not root.is_dir():
        raise FormatError(f"{uri}: {'not a folder' if root.exists() else 'no such folder'}. Correct the set's `uri`.")
    unlisted: Counter[str] = Counter()
    entries = [_entry(root, path, identity) for path in _files(root, unlisted)]
    if not entries:
        raise FormatError(
            f"{uri}: no image file ({', '.join(sorted(EXTENSIONS))}) in this folder. Correct the set's `uri`."
        )
    return Listing(entries=entries, unlisted=dict(sorted(unlisted.items())))


def open_image(uri: str, key: str) -> BufferedReader:
    """The image `key` as a stream; OSError if it is gone or is no regular file inside the set's folder."""
    path = Path(uri) / key
    if not _inside(Path(uri), path):
        raise OSError("not a regular file inside the set's folder")
    return path.open("rb")


def _files(root: Path, unlisted: Counter[str]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise FormatError(f"{error.filename}: cannot be listed ({error.strerror}). Give access to it or move it away.")

    for folder, folders, names in os.walk(root, followlinks=False, onerror=refuse):
        unlisted["linked folder"] += sum(Path(folder, name).is_symlink() for name in folders)
        for name in names:
            if PurePosixPath(name).suffix.lower() in EXTENSIONS:
                yield Path(folder, name)
            else:
                unlisted[PurePosixPath(name).suffix.lower() or "no extension"] += 1
    unlisted += Counter()


def _entry(root: Path, path: Path, identity: str) -> Entry:
    relative = path.relative_to(root)
    raw = os.fsencode(str(PurePosixPath(relative)))
    key = raw.decode("utf-8", "backslashreplace")
    label = str(PurePosixPath(key).parent)
    error = None
    if raw != key.encode():
        error = "the file name is not valid UTF-8; rename the file"
    elif not _inside(root, path):
        error = "not a regular file inside the set's folder (links that leave it are not followed)"
    size = os.path.getsize(path) if error is None else 0
    return Entry(key=key, identity=None if identity == "none" or label == "." else label, bytes=size, error=error)


def _inside(root: Path, path: Path) -> bool:
    """Whether `path` leads to a regular file below `root`; what cannot be looked at does not."""
    return os.path.isfile(path) and path.resolve().is_relative_to(root.resolve())
