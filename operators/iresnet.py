"""IResNet, the network of ArcFace and AdaFace, built here so that a file of weights needs no code of its own.

Deng et al., ArcFace, CVPR 2019, section 3.1: residual units BN-Conv-BN-PReLU-Conv-BN, a first convolution that keeps
the 112 x 112 pixels, four stages that each halve them, and after the last the head BN-Dropout-FC-BN. AdaFace (Kim et
al., CVPR 2022, section 4) uses the same network, but for the first stage's shortcut: it drops every other pixel, where
ArcFace has a 1 x 1 convolution. Dropout is left out, as it does nothing outside training.

Shapes: N faces, C channels, H x W pixels, D components of an embedding.
"""

import logging
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from operators.alignment import alignment
from operators.backbones import BackboneConfig
from operators.checkpoints import ADAFACE, ARCFACE, Checkpoint, load, require, units
from operators.cuda import usable_device
from operators.errors import ModelError
from operators.runtimes import EQUIVALENT, ROUNDED, distance
from operators.tables import FACE_PIXELS

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

UNITS: dict[str, tuple[int, ...]] = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
}
"""Residual units per stage. AdaFace calls the last one IR-101."""
CHANNELS = (64, 128, 256, 512)
"""Channels per stage."""
LAST_PIXELS = FACE_PIXELS // 16
"""Height and width after the four stages."""


class TorchBackbone:
    """An IResNet run by PyTorch, on a CUDA device where there is one."""

    def __init__(self, config: BackboneConfig) -> None:
        """Build the declared network and fill it from the pinned file.

        Raises
        ------
        ModelError
            If the file cannot be used (`operators.checkpoints.load`), its weights are not those of the declared
            architecture and width, or the crop or the arithmetic cannot be had.
        """
        import torch

        if config.flip:
            raise ValueError("TorchBackbone embeds one way round. Use operators.backbones.open_backbone for flip.")
        self.config = config
        self.place = usable_device() or torch.device("cpu")
        cuda = self.place.type == "cuda"
        self.device: str = f"{torch.cuda.get_device_name(self.place) if cuda else 'cpu'} {config.dtype}"
        if config.dtype == "float16" and not cuda:
            raise ModelError(
                f"embedder.dtype: float16 needs a CUDA device, and torch sees none. Set float32 or bfloat16 to embed "
                f"with {config.path} here."
            )
        self.reason = "a CUDA device is present" if cuda else "torch sees no CUDA device"
        network = filled(config)
        lower(network, getattr(torch, config.dtype))
        self.network = network.to(self.place, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.compile:
            self._compile()
        log.info("%s: %s on %s (%s)", config.path, config.architecture, self.device, self.reason)

    def _compile(self) -> None:
        """Let torch rewrite the network, and try it: ModelError if it cannot, or gives other embeddings."""
        import torch

        shape = (self.config.batch, 3, FACE_PIXELS, FACE_PIXELS)
        probes = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
        wanted = self.raw(probes)
        self.network = torch.compile(self.network, dynamic=False)
        try:
            found = self.raw(probes)
        except RuntimeError as error:
            raise ModelError(
                f"{self.config.path}: torch.compile failed ({str(error).splitlines()[0]}). It needs a C++ compiler, "
                f"and Triton for CUDA. Install them, or set embedder.compile to false."
            ) from error
        apart = distance(found, wanted)
        allowed = EQUIVALENT if self.config.dtype == "float32" else ROUNDED
        if not apart <= allowed:
            raise ModelError(
                f"{self.config.path}: compiled it gives other embeddings (unit vectors {apart:.3g} apart, at most "
                f"{allowed:g} is allowed in {self.config.dtype}). Set embedder.compile to false."
            )
        self.device += " compiled"
        self.reason += f", compiled, unit vectors {apart:.2g} from the network as it is"

    def __call__(self, faces_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Raw embeddings (N, D) of aligned RGB faces (N, 112, 112, 3)."""
        batch = self.config.batch
        outputs = [self._padded(faces_NHWC[at : at + batch]) for at in range(0, len(faces_NHWC), batch)]
        return np.concatenate(outputs) if outputs else np.zeros((0, self.config.width), np.float32)

    def raw(self, planes_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raw embeddings (N, D) of what the network takes: colours in its order, normalised.

        fp32 is fp32 on CUDA too, not TF32, and the same input gives the same bits.
        """
        import torch

        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            planes = torch.from_numpy(planes_NCHW).to(self.place, memory_format=torch.channels_last)
            embeddings: NDArray[np.float32] = self.network(planes).cpu().numpy()
        return embeddings

    def _padded(self, faces_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        count = len(faces_NHWC)
        padded = np.pad(faces_NHWC, ((0, self.config.batch - count), (0, 0), (0, 0), (0, 0)))
        if self.config.channels == "bgr":
            padded = padded[..., ::-1]
        planes = np.ascontiguousarray(padded.transpose(0, 3, 1, 2), np.float32)
        return self.raw((planes - np.float32(self.config.mean)) * np.float32(self.config.scale))[:count]


def filled(config: BackboneConfig) -> "nn.Module":
    """The declared network with the weights of the pinned file, fp32 on the CPU, ready to embed.

    Raises
    ------
    ModelError
        As for `TorchBackbone`.
    """
    import torch

    if config.architecture not in UNITS:
        raise ModelError(f"embedder.architecture must be one of {', '.join(UNITS)}. Got {config.architecture!r}.")
    pixels = alignment(config.alignment).pixels
    if pixels != FACE_PIXELS:
        raise ModelError(
            f"embedder.alignment: {config.architecture} takes crops of {FACE_PIXELS} pixels a side. "
            f"Got {config.alignment}, which has {pixels}."
        )
    checkpoint = load(config.path, config.sha256)
    with torch.device("meta"):
        network = build(config.architecture, config.width, checkpoint.layout)
    state = network.state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items() if not name.endswith("num_batches_tracked")}
    require(config.path, checkpoint.weights, shapes, _hint(config, checkpoint))
    network.to_empty(device="cpu")
    network.load_state_dict(checkpoint.weights, strict=False)
    return network.eval().requires_grad_(False)


def build(architecture: str, width: int, layout: str = ARCFACE) -> "nn.Module":
    """An untrained IResNet: (N, 3, 112, 112) normalised pixels in, raw embeddings (N, `width`) out, in fp32.

    Parameters are named as in InsightFace's `arcface_torch`, whatever the layout.

    Raises
    ------
    KeyError
        If `architecture` is not one of `UNITS`.
    """
    from torch import nn

    stages = []
    inputs = CHANNELS[0]
    for channels, count in zip(CHANNELS, UNITS[architecture], strict=True):
        first = _unit_class()(inputs, channels, 2, _shortcut(inputs, channels, layout))
        rest = [_unit_class()(channels, channels, 1, nn.Identity()) for _ in range(count - 1)]
        stages.append(nn.Sequential(first, *rest))
        inputs = channels
    return _network_class()(stages, width)


def lower(network: "nn.Module", dtype: "torch.dtype") -> None:
    """Let convolutions run in `dtype`, in place. Statistics and the head stay in fp32, as in ArcFace's training."""
    from torch import nn

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.PReLU):
            module.to(dtype)


def _hint(config: BackboneConfig, checkpoint: Checkpoint) -> str:
    """What to do about weights that do not fit: what the file looks like, if it is anything known."""
    names = {counts: name for name, counts in UNITS.items()}
    likely = names.get(units(checkpoint.weights))
    last = checkpoint.weights.get("fc.weight")
    width = None if last is None or last.ndim != 2 else len(last)
    if likely is None or width is None or (likely, width) == (config.architecture, config.width):
        return f"It is no plain {', '.join(UNITS)} for 112 x 112 pixels. Export it as ONNX and set embedder.backend."
    return (
        f"The file looks like {likely} with embeddings of {width} components: "
        f"set embedder.architecture to {likely} and embedder.width to {width}."
    )


def _shortcut(inputs: int, outputs: int, layout: str) -> "nn.Module":
    """What a stage's first unit adds to its output (N, `outputs`, H/2, W/2), from its input (N, `inputs`, H, W)."""
    from torch import nn

    if layout == ADAFACE and inputs == outputs:
        return nn.MaxPool2d(1, 2)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))


@cache
def _unit_class() -> "type[nn.Module]":
    """The residual unit of section 3.1 ("IR"), as a class; a function because torch is imported where it is used."""
    from torch import Tensor, nn

    class Unit(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int, shortcut: nn.Module) -> None:
            super().__init__()
            self.bn1 = nn.BatchNorm2d(inputs)
            self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.prelu = nn.PReLU(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs)
            self.downsample = shortcut

        def forward(self, x_NCHW: Tensor) -> Tensor:
            inner = self.prelu(self.bn2(self.conv1(self.bn1(x_NCHW))))
            added: Tensor = self.bn3(self.conv2(inner)) + self.downsample(x_NCHW)
            return added

    return Unit


@cache
def _network_class() -> "type[nn.Module]":
    """The whole network as a class: first convolution, the four stages that it is given, head."""
    from torch import Tensor, nn

    class Network(nn.Module):
        def __init__(self, stages: list[nn.Sequential], width: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, CHANNELS[0], 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(CHANNELS[0])
            self.prelu = nn.PReLU(CHANNELS[0])
            self.layer1, self.layer2, self.layer3, self.layer4 = stages
            self.bn2 = nn.BatchNorm2d(CHANNELS[-1])
            self.fc = nn.Linear(CHANNELS[-1] * LAST_PIXELS * LAST_PIXELS, width)
            self.features = nn.BatchNorm1d(width)

        def forward(self, planes_NCHW: Tensor) -> Tensor:
            x = self.prelu(self.bn1(self.conv1(planes_NCHW.to(self.conv1.weight.dtype))))
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            embeddings: Tensor = self.features(self.fc(self.bn2(x.float()).flatten(1)))
            return embeddings

    return Network
