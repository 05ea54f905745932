"""The demo corpus on disk: four folders of JPEG files, `planted.csv`, `broken.csv` and, last, `corpus.json`.

`planted.csv` is the key: release_key, leak, source_key, source_identity, second_source_key, second_source_identity,
where keys are paths inside the release and the training folder. `broken.csv` lists set, key and kind of the files that
cannot be audited. `corpus.json` marks a complete corpus.
"""

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image as Pillow

from operators.errors import ConfigError
from seeds.demo.generator import BATCH, LATENT, Generator
from seeds.demo.leaks import BLENDS, COPIES, COPY_QUALITY, DIALS, Image, Latent, as_pixels, blend, moved
from seeds.demo.planting import SEED, VERSION, Broken, Picture, Plan, Planted, make_plan, stream

PIXELS = 128
"""Side of an image: twice what the generator makes. YuNet finds 99.5 % of the faces at this size and 98.9 % at 64."""

SPREAD = 0.8
"""Deviation of latents, where the generator saw 1: odd latents give smeared faces (the truncation trick). Measured
against 1, YuNet finds 99.5 instead of 99.1 % of the faces, and of pairs of one person 99.2 instead of 97.6 % have a
higher SFace cosine than one in 10,000 pairs of strangers. At 0.5 all faces blur into one and 8 % are not found."""

WITHIN = 0.15
"""How far an image of a person is from the person's latent. Two images of a person then have a mean SFace cosine of
0.80; at 0.2 a tenth of such pairs would score below one in 10,000 pairs of strangers."""

MARKER = "corpus.json"
PLANTED_COLUMNS = (
    "release_key",
    "leak",
    "source_key",
    "source_identity",
    "second_source_key",
    "second_source_identity",
)
TERMS = "Generated faces; generator weights MIT, trained on DigiFace-1M: non-commercial research."


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """A complete corpus: its files per set, planted and broken, and whether this call made it."""

    counts: dict[str, int]
    made: bool


def make(out: Path, *, seed: int = SEED, scale: float = 1.0) -> Corpus:
    """Make sure that `out` holds the corpus of this seed and scale.

    It is made in a folder beside `out` that is renamed at the end: `out` is complete or not there, and what an
    interrupted make left behind is made again.

    Raises
    ------
    ConfigError
        If `out` holds another corpus or anything else; nothing in it is changed.
    """
    plan = make_plan(seed, scale)
    counts = {name: len(pictures) for name, pictures in plan.pictures.items()}
    counts |= {"planted": len(plan.planted), "broken": len(plan.broken)}
    marker = _marker(plan, counts)
    if _is_complete(out, marker):
        return Corpus(counts=counts, made=False)
    target = out.resolve()
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    _write_files(unfinished, plan)
    _write_key(unfinished, plan)
    (unfinished / MARKER).write_text(marker)
    os.replace(unfinished, target)
    return Corpus(counts=counts, made=True)


def _marker(plan: Plan, counts: dict[str, int]) -> str:
    """The text of `corpus.json`."""
    facts = {"version": VERSION, "seed": plan.seed, "scale": plan.scale, "plan": plan.digest}
    return json.dumps({**facts, "counts": counts, "terms": TERMS}, indent=2) + "\n"


def _is_complete(out: Path, marker: str) -> bool:
    """Whether `out` holds that corpus; False if it is absent or empty, ConfigError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MARKER).is_file():
        raise ConfigError(f"demo corpus {out}: exists and holds no complete corpus. Remove it or name another folder.")
    if (out / MARKER).read_text() != marker:
        raise ConfigError(f"demo corpus {out}: is of another seed, scale or version. Remove it or name another folder.")
    return True


def _write_files(root: Path, plan: Plan) -> None:
    """Write the images of all sets and the broken files."""
    generator = Generator()
    planted = {p.release_key: p for p in plan.planted}
    for name, pictures in plan.pictures.items():
        made = [p for p in pictures if name != "release" or p.key not in planted]
        latents = (_latent(plan.seed, name, p) for p in made)
        _write_all(root / name, _developed(generator, plan.seed, name, [p.key for p in made], latents))
    dialled = [p for p in plan.planted if p.leak in DIALS]
    latents = (_dialled(plan.seed, p) for p in dialled)
    _write_all(root / "release", _developed(generator, plan.seed, "release", [p.release_key for p in dialled], latents))
    copied = [p for p in plan.planted if p.leak not in DIALS]
    _write_all(root / "release", ((p.release_key, _copied(root / "training", plan.seed, p)) for p in copied))
    for broken in plan.broken:
        _write_all(root / broken.set, [(broken.key, _broken(generator, plan.seed, broken))])


def _write_all(folder: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write files by their paths inside `folder`."""
    for key, content in files:
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _write_key(root: Path, plan: Plan) -> None:
    """Write `planted.csv` and `broken.csv`."""
    rows = []
    for p in plan.planted:
        second = (p.second.key, p.second.identity) if p.second else ("", "")
        rows.append((p.release_key, p.leak, p.source.key, p.source.identity, *second))
    broken = [(b.set, b.key, b.kind) for b in plan.broken]
    for file, header, lines in (("planted.csv", PLANTED_COLUMNS, rows), ("broken.csv", ("set", "key", "kind"), broken)):
        with (root / file).open("w", newline="") as handle:
            csv.writer(handle, lineterminator="\n").writerows([header, *lines])


def _latent(seed: int, name: str, picture: Picture) -> Latent:
    """The latent of an image: near that of its person."""
    person = SPREAD * stream(seed, "person", name, picture.identity).standard_normal(LATENT)
    return moved(person.astype(np.float32), WITHIN, stream(seed, "shot", name, picture.key), SPREAD)


def _dialled(seed: int, planted: Planted) -> Latent:
    """The latent of a leak by memory: moved away from that of the training image."""
    source = _latent(seed, "training", planted.source)
    return moved(source, DIALS[planted.leak], stream(seed, "dial", planted.release_key), SPREAD)


def _developed(
    generator: Generator, seed: int, name: str, keys: list[str], latents: Iterable[Latent]
) -> Iterator[tuple[str, bytes]]:
    """Keys with their JPEG files, as a camera would give them: light, colour and quality differ mildly."""
    waiting = list(latents)
    for start in range(0, len(keys), BATCH):
        faces = generator.faces(np.stack(waiting[start : start + BATCH]))
        for key, face in zip(keys[start : start + BATCH], faces, strict=False):
            rng = stream(seed, "camera", name, key)
            yield key, _jpeg(_photographed(_enlarged(face), rng), int(rng.integers(80, 96)))


def _enlarged(face: Image) -> Image:
    """The generated face at the corpus's size."""
    return as_pixels(cv2.resize(face, (PIXELS, PIXELS), interpolation=cv2.INTER_CUBIC))


def _photographed(image: Image, rng: np.random.Generator) -> Image:
    """The image in slightly other light, with a camera's noise of one to two grey levels."""
    light = rng.uniform(0.92, 1.08) * rng.uniform(0.97, 1.03, 3)
    pixels = 255 * np.clip(image / 255 * light, 0, 1) ** rng.uniform(0.9, 1.1)
    return as_pixels(pixels + rng.normal(0, rng.uniform(1, 2), image.shape))


def _copied(training: Path, seed: int, planted: Planted) -> bytes:
    """The JPEG file of a leak of pixels, made from the very file in the training folder."""
    rng = stream(seed, "copy", planted.release_key)
    image = _pixels(training / planted.source.key)
    if planted.second is not None:
        image = blend(image, _pixels(training / planted.second.key), BLENDS[planted.leak])
    else:
        image = COPIES[planted.leak](image, rng)
    return _jpeg(image, int(rng.integers(COPY_QUALITY[0], COPY_QUALITY[1] + 1)))


def _pixels(path: Path) -> Image:
    with Pillow.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _jpeg(image: Image, quality: int) -> bytes:
    """The image as a JPEG file."""
    buffer = io.BytesIO()
    Pillow.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _broken(generator: Generator, seed: int, broken: Broken) -> bytes:
    """The content of a file that cannot be audited."""
    rng = stream(seed, "broken", broken.set, broken.key)
    match broken.kind:
        case "empty":
            return b""
        case "truncated":
            whole = _jpeg(_strangers(generator, rng)[0], 90)
            return whole[: len(whole) // 2]
        case "no_face":
            clouds = cv2.resize(rng.uniform(90, 170, (4, 4, 3)), (PIXELS, PIXELS), interpolation=cv2.INTER_CUBIC)
            return _jpeg(as_pixels(clouds), 90)
        case "two_faces":
            return _jpeg(np.concatenate(_strangers(generator, rng), axis=1), 90)
        case _:
            return b"Not an image: a file of the demo corpus that an audit must report and not fail on.\n"


def _strangers(generator: Generator, rng: np.random.Generator) -> list[Image]:
    """Two faces of nobody in the corpus."""
    latents = SPREAD * rng.standard_normal((2, LATENT))
    return [_enlarged(face) for face in generator.faces(latents.astype(np.float32))]
