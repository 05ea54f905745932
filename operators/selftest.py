"""A drawn face that tells whether a network is fed as it was trained.

A network whose colours are swapped or whose pixels have another range still gives finite vectors, only worse ones. So a
model's configuration may state the first components of the unit vector of one picture that is drawn here, by
arithmetic that has the same bits on every machine.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from operators.alignment import alignment
from operators.errors import ModelError

if TYPE_CHECKING:
    from operators.backbones import BackboneConfig

COMPONENTS = 8
"""Components of the unit vector that `self_test_vector` gives."""
TOLERANCES: Mapping[str, float] = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1.5e-1}
"""By `dtype`: how far the unit vector may be from the stated one, as estimated from the stated components. Measured
for SFace: 2e-6 between runtimes, 3e-2 for bfloat16, 0.3 and more for swapped colours or a missing normalisation."""
RANGES = ((0.0, 1.0), (127.5, 1 / 127.5), (127.5, 1 / 128), (0.0, 1 / 255))
"""Usual `mean` and `scale` of face networks."""


class Embeds(Protocol):
    """A network as `operators.backbones` opens it."""

    config: "BackboneConfig"
    device: str

    def __call__(self, faces_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Raw embeddings (N, D) of aligned RGB faces (N, H, W, 3)."""
        ...


def drawn_face(pixels: int = 112) -> NDArray[np.uint8]:
    """A drawn face, RGB, shape (pixels, pixels, 3): eyes, nose and mouth where the alignments put them.

    Its colours differ from each other and its sides too, so that no exchange of channels or sides leaves it as it is.
    Only sums, products and comparisons: the same bits everywhere.
    """
    y, x = np.meshgrid(*2 * [(np.arange(pixels) + 0.5) / pixels], indexing="ij")
    face = np.stack([60 + 90 * x, 110 - 50 * y, 150 - 60 * x * y], 2)
    skin = np.stack([225 - 70 * x, 170 - 40 * y - 35 * x, 130 - 50 * x], 2)
    shapes: tuple[tuple[float, float, float, float, NDArray[np.float64] | tuple[int, int, int]], ...] = (
        (0.50, 0.32, 0.47, 0.42, (70, 40, 25)),
        (0.50, 0.56, 0.38, 0.50, skin),
        (0.34, 0.46, 0.085, 0.045, (245, 240, 235)),
        (0.66, 0.46, 0.085, 0.045, (245, 240, 235)),
        (0.35, 0.46, 0.040, 0.045, (40, 70, 120)),
        (0.65, 0.46, 0.040, 0.045, (40, 70, 120)),
        (0.33, 0.37, 0.110, 0.020, (60, 35, 20)),
        (0.68, 0.36, 0.120, 0.026, (60, 35, 20)),
        (0.50, 0.63, 0.055, 0.030, (160, 95, 75)),
        (0.48, 0.58, 0.018, 0.100, (235, 190, 150)),
        (0.51, 0.82, 0.135, 0.040, (190, 60, 70)),
        (0.70, 0.70, 0.030, 0.028, (90, 50, 35)),
    )
    for centre_x, centre_y, half_width, half_height, colour in shapes:
        across, down = (x - centre_x) / half_width, (y - centre_y) / half_height
        inside = across * across + down * down < 1
        face = np.where(inside[:, :, None], colour, face)
    return np.floor(face).astype(np.uint8)


def self_test_vector(backbone: Embeds) -> tuple[float, ...]:
    """First components of the unit vector of the drawn face, rounded to six digits, as `self_test` states them.

    `backbone` is opened without `flip`: the self-test is of the network, so it holds with and without.

    Raises
    ------
    ModelError
        If the vector is not finite or zero.
    """
    if backbone.config.flip:
        raise ValueError("the self-test is of the network without `flip`: open it with flip=False")
    return tuple(round(float(value), 6) for value in _unit(backbone)[:COMPONENTS])


def check_self_test(backbone: Embeds, reopen: "Callable[[BackboneConfig], Embeds]") -> None:
    """ModelError unless `backbone` gives the `self_test` of its configuration; none stated is none checked.

    `reopen` opens the same file under another configuration, without a self-test: if one with other `channels`, `mean`
    or `scale` gives the stated vector, the message names it.
    """
    config = backbone.config
    if not config.self_test:
        return
    if len(config.self_test) > config.width:
        raise ModelError(f"{config.path}: self_test has more components than the width {config.width}. Correct it.")
    found = _distance(_unit(backbone), config.self_test)
    allowed = TOLERANCES[config.dtype]
    if found <= allowed:
        return
    for other in _alternatives(config):
        network = reopen(other)
        if _distance(_unit(network), config.self_test) <= allowed:
            remedy = " and ".join(
                f"{name} to {getattr(other, name)!r}"
                for name in ("channels", "mean", "scale")
                if getattr(other, name) != getattr(config, name)
            )
            raise ModelError(
                f"{config.path}: fails its self-test on the drawn face and passes it otherwise. Set embedder: {remedy}."
            )
    raise ModelError(
        f"{config.path}: fails its self-test on the drawn face (its unit vector is {found:.3g} from the stated one, at "
        f"most {allowed:g} is allowed), with other usual channels, mean and scale too. Give the file, sha256 and "
        f"self_test of one and the same model."
    )


def _unit(backbone: Embeds) -> NDArray[np.float64]:
    """The unit vector (D,) of the drawn face."""
    raw = backbone(drawn_face(alignment(backbone.config.alignment).pixels)[None])[0].astype(np.float64)
    length = np.linalg.norm(raw)
    if not np.isfinite(length) or length == 0:
        raise ModelError(
            f"{backbone.config.path}: the embedding of the drawn face is not finite or is zero on {backbone.device}. "
            f"Use dtype float32, or another model."
        )
    return np.asarray(raw / length)


def _distance(unit_D: NDArray[np.float64], stated: tuple[float, ...]) -> float:
    """Distance of unit vectors, estimated from the stated components as if the others differed alike."""
    part = np.linalg.norm(unit_D[: len(stated)] - np.asarray(stated))
    return float(part * np.sqrt(len(unit_D) / len(stated)))


def _alternatives(config: "BackboneConfig") -> "Iterator[BackboneConfig]":
    """Configurations with other channels, other range, then both."""
    bare = replace(config, self_test=())
    swapped = "bgr" if config.channels == "rgb" else "rgb"
    for channels in (config.channels, swapped):
        for mean, scale in ((config.mean, config.scale), *RANGES):
            other = replace(bare, channels=channels, mean=mean, scale=scale)
            if other != bare:
                yield other
