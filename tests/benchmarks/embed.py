"""The embed stage against its peers: `make bench-embed` (QUICK=1 for a minute's version).

All in the same run, on the same images (the demo corpus), with the same detector and network, on the same cores:

- pipeline   the embed stage from listed units to committed tables, in a Ray session that is up already
- bare       the best loop by hand: one process for each core, decode, detect, align, batches into the same runtime
- one        one image at a time with OpenCV's own detector and recogniser, as face libraries do it, all cores
- stock      the network alone in ONNX Runtime as it is published, against the way that was chosen, one thread

`first` is the time to the first committed unit, the price of starting workers and opening models. The bare loop runs
before and after the pipeline, and its better rate counts. Memory is sampled all the time: what workers and their
children, the driver, and Ray's object store hold. The last line is JSON. IMAGES=n takes another number of the demo's
images; COPIES=3,25 runs the pipeline on three and on 25 times as many (every copy has other bytes).
"""

import json
import multiprocessing
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

QUICK = os.environ.get("QUICK") == "1"
os.environ.setdefault("RAY_worker_niceness", "0")  # as the bare loop: Ray's workers give way to all else otherwise
IMAGES = 400 if QUICK else int(os.environ.get("IMAGES", "4000"))
COPIES = [1] if QUICK else [int(one) for one in os.environ.get("COPIES", "1,3").split(",")]
POINTS = 9
"""Of the run, evenly spaced, at which its memory is printed."""
Sample = tuple[float, float, float]
"""GiB of workers and their children, of the driver, and of Ray's object store."""
CORES = len(os.sched_getaffinity(0))
ROLES = ("release", "training", "control", "anchor")
DATA = Path("data/demo")
THRESHOLD = 0.6


def images() -> list[Path]:
    found = [path for role in ROLES for path in sorted((DATA / role).rglob("*")) if path.is_file()]
    if not found:
        sys.exit(f"{DATA}: no images. Run `make setup` first.")
    return found[:IMAGES]


def linked(paths: list[Path], folder: Path, copies: int) -> Path:
    """A folder with these images; every further copy has other bytes, for equal images are embedded once."""
    for copy in range(copies):
        for at, path in enumerate(paths):
            target = folder / f"{copy:02d}" / f"{at:06d}{path.suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes() + b"\0" * copy)
    return folder


def pipeline(folder: Path, out: Path) -> tuple[float, float, int, list[Sample]]:
    """Seconds of the embed stage, seconds to the first unit, images, and memory over time."""
    from pipeline.config import load
    from pipeline.embed import embed
    from pipeline.scan import scan
    from pipeline.stage import Run

    out.mkdir()
    config = out / "audit.yaml"
    (out / "other").mkdir()
    (out / "other" / "one.jpg").write_bytes(next(folder.rglob("*.*")).read_bytes())
    config.write_text(
        f"out: {out}/run\nsets:\n  release: {{uri: {folder}}}\n  training: {{uri: {out}/other}}\n"
        f"scan: {{unit_images: {64 if QUICK else 256}}}\n"
    )
    with Run(load(str(config))) as run:
        scan(run)
        run.ray()
        samples: list[Sample] = []
        stop = threading.Event()
        watch = threading.Thread(target=_watch, args=(samples, stop))
        watch.start()
        start = time.time()
        embed(run)
        seconds = time.time() - start
        stop.set()
        watch.join()
        first = min(path.stat().st_mtime for path in run.embeddings.root.rglob("*.parquet")) - start
        return seconds, first, run.ledger.record["stages"]["embed"]["embedded_now"], samples


def _watch(samples: list[Sample], stop: threading.Event) -> None:
    while not stop.wait(2.0):
        samples.append(_memory())


def _memory() -> Sample:
    """Memory that is not shared (PSS would need more rights) of workers and driver; shared memory of the raylet."""
    workers = driver = store = 0
    for folder in Path("/proc").iterdir():
        try:
            line = (folder / "cmdline").read_bytes()
            if b"ray::" in line or b"operators.sandbox" in line:
                workers += _kib(folder, "RssAnon")
            elif folder.name == str(os.getpid()):
                driver += _kib(folder, "RssAnon")
            elif b"raylet/raylet" in line:
                store += _kib(folder, "RssShmem")
        except (OSError, ValueError):
            continue
    return workers / 2**20, driver / 2**20, store / 2**20


def _kib(folder: Path, name: str) -> int:
    rows = (folder / "status").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith(name))


def _over_time(samples: list[Sample]) -> str:
    """Workers, driver and store at a few moments of the run, in GiB."""
    places = np.linspace(0, len(samples) - 1, POINTS).round().astype(int)
    lines = zip(*(samples[at] for at in places), strict=True)
    names = ("workers", "driver", "object store")
    return "; ".join(f"{name} {' '.join(f'{v:.2f}' for v in row)}" for name, row in zip(names, lines, strict=True))


def _prepared(paths: list[Path]) -> float:
    """The loop by hand in one process; seconds without the opening of models."""
    from dataclasses import replace

    from operators.backbones import BackboneConfig, open_backbone
    from operators.faces import FaceConfig, FacePreparation
    from operators.images import ImageFault

    prepare = FacePreparation(replace(FaceConfig(), isolate=False))
    network = open_backbone(BackboneConfig())
    start = time.perf_counter()
    held = []
    for path in paths:
        try:
            held.append(np.frombuffer(prepare.prepare(path.read_bytes())["crop"], np.uint8).reshape(112, 112, 3))
        except ImageFault:
            continue
        if len(held) == 64:
            network(np.stack(held))
            held = []
    if held:
        network(np.stack(held))
    return time.perf_counter() - start


def bare(paths: list[Path]) -> float:
    """Images a second of one such process for each core."""
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        seconds = pool.map(_prepared, [paths[at::CORES] for at in range(CORES)], chunksize=1)
    return len(paths) / max(seconds)


def one_at_a_time(paths: list[Path]) -> float:
    """Images a second through OpenCV's detector and recogniser."""
    import cv2

    detector = cv2.FaceDetectorYN.create("models/yunet_2023mar.onnx", "", (320, 320), THRESHOLD)
    recogniser = cv2.FaceRecognizerSF.create("models/sface_2021dec.onnx", "")
    start = time.perf_counter()
    for path in paths:
        image = cv2.imread(str(path))
        if image is None:
            continue
        detector.setInputSize(image.shape[1::-1])
        faces = detector.detect(image)[1]
        if faces is not None:
            recogniser.feature(recogniser.alignCrop(image, max(faces, key=lambda face: face[2] * face[3])))
    return len(paths) / (time.perf_counter() - start)


def network_alone() -> tuple[float, float, float, str]:
    """Faces/s of one thread: as published in ONNX Runtime, as chosen, in bfloat16 (0 where there is none)."""
    from dataclasses import replace
    from unittest.mock import patch

    import onnx
    import onnxruntime

    from operators import graphs
    from operators.backbones import BackboneConfig, open_backbone
    from operators.errors import ModelError
    from seeds.face_models import MODELS, shipped_file

    model = next(one for one in MODELS if one.name == "sface_2021dec")
    shipped = onnx.load(str(shipped_file(model.shipped, model.package)))
    with patch.object(graphs, "_split_prelu", lambda nodes, constants: (nodes, constants)):
        published = graphs.plain_graph(shipped, input_name=model.input_name, dynamic=model.dynamic)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(published.SerializeToString(), options, providers=["CPUExecutionProvider"])
    faces = np.random.default_rng(0).integers(0, 256, (8, 112, 112, 3), np.uint8)
    planes = np.ascontiguousarray(faces.transpose(0, 3, 1, 2), np.float32)
    chosen = open_backbone(BackboneConfig())
    try:
        low = open_backbone(replace(BackboneConfig(), dtype="bfloat16"))
    except ModelError:
        low = None
    stock = _rate(lambda: session.run(None, {model.input_name: planes}), 8)
    return stock, _rate(lambda: chosen(faces), 8), _rate(lambda: low(faces), 8) if low else 0.0, chosen.device


def _rate(work: Callable[[], object], each: int) -> float:
    work()
    times = []
    for _ in range(5 if QUICK else 15):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return each / float(np.median(times))


def main() -> None:
    paths = images()
    with open("/proc/cpuinfo") as file:
        processor = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("ray", "onnxruntime", "openvino", "opencv-python-headless")
    )
    print(f"{processor}, {CORES} cores, Python {platform.python_version()}, {packages}")
    stock, chosen, low, device = network_alone()
    print(
        f"network alone, faces/s of one thread: stock {stock:.0f}, chosen ({device}) {chosen:.0f}, bfloat16 {low:.0f}"
    )
    by_hand = bare(paths)
    slow = one_at_a_time(paths[: 100 if QUICK else 600])
    print(f"images/s on {CORES} cores: bare loop {by_hand:.1f}, one at a time {slow:.1f}")
    rows = [measured(paths, copies) for copies in COPIES]
    again = bare(paths)
    print(f"bare loop again: {again:.1f}")
    best = max(by_hand, again)
    count, seconds, first, _, _ = rows[-1]
    figures = {
        "bench": "embed",
        "efficiency": round(count / seconds / best, 3),
        "ratio_vs_one_at_a_time": round(count / seconds / slow, 2),
        "ratio_vs_stock_runtime": round(chosen / stock, 2),
        "ratio_vs_stock_runtime_bfloat16": round(low / stock, 2),
        "images_per_s": round(count / seconds, 1),
        "start_s": round(first, 1),
        "peak_gib": [round(row[3], 2) for row in rows],
        "settled_gib": [round(row[4], 2) for row in rows],
        "bare_images_per_s": [round(by_hand, 1), round(again, 1)],
        "images": [int(row[0]) for row in rows],
        "quick": QUICK,
    }
    print(json.dumps(figures))


def measured(paths: list[Path], copies: int) -> tuple[int, float, float, float, float]:
    """Images, seconds, seconds to the first unit; GiB at most, and their median over the second half."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = linked(paths, Path(scratch) / "images", copies)
        seconds, first, count, samples = pipeline(folder, Path(scratch) / "out")
    totals = [sum(sample) for sample in samples]
    peak, settled = max(totals), float(np.median(totals[len(totals) // 2 :]))
    print(
        f"pipeline: {count:,} images in {seconds:.1f} s = {count / seconds:.1f}/s, first unit after {first:.1f} s; "
        f"memory {peak:.2f} GiB at most, {settled:.2f} in the second half\n  GiB over time: {_over_time(samples)}",
        flush=True,
    )
    return count, seconds, first, peak, settled


if __name__ == "__main__":
    main()
