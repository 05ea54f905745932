"""The embed stage against its peers: `make bench-embed` (QUICK=1 for a minute's version).

All in the same run, on the same images (the demo corpus), with the same detector and network, on the same cores:

- pipeline   the embed stage from listed units to committed tables, in a Ray session that is up already
- bare       the best loop by hand: one process for each core, decode, detect, align, batches into the same runtime
- one        one image at a time with OpenCV's own detector and recogniser, as face libraries do it, all cores
- stock      the network alone in ONNX Runtime as it is published, against the way that was chosen, one thread

`first` is the time to the first committed unit, the price of starting workers and opening models. The last line is
JSON. IMAGES=n takes another number of the demo's images, COPIES=n makes the last row n times as long.
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
IMAGES = 400 if QUICK else int(os.environ.get("IMAGES", "4000"))
COPIES = int(os.environ.get("COPIES", "3"))
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


def pipeline(folder: Path, out: Path) -> tuple[float, float, float, float]:
    """Seconds of the embed stage, seconds to the first unit, images, and peak memory of its processes in GiB."""
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
        peak, stop = [0.0], threading.Event()
        watch = threading.Thread(target=_watch, args=(peak, stop))
        watch.start()
        start = time.time()
        embed(run)
        seconds = time.time() - start
        stop.set()
        watch.join()
        first = min(path.stat().st_mtime for path in run.embeddings.root.rglob("*.parquet")) - start
        return seconds, first, run.ledger.record["stages"]["embed"]["embedded_now"], peak[0]


def _watch(peak: list[float], stop: threading.Event) -> None:
    while not stop.wait(1.0):
        peak[0] = max(peak[0], _workers_gib())


def _workers_gib() -> float:
    """Memory that is not shared (PSS would need more rights) of this project's Ray workers and their children."""
    total = 0
    for folder in Path("/proc").iterdir():
        try:
            line = (folder / "cmdline").read_bytes()
            if b"ray::" in line or b"operators.sandbox" in line:
                total += sum(
                    int(row.split()[1])
                    for row in (folder / "status").read_text().splitlines()
                    if row.startswith("RssAnon")
                )
        except (OSError, ValueError):
            continue
    return total / 2**20


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
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for copies in (1,) if QUICK else (1, COPIES):
            folder = linked(paths, Path(scratch) / f"images{copies}", copies)
            seconds, first, count, peak = pipeline(folder, Path(scratch) / f"out{copies}")
            rows.append((count, seconds, first, peak))
            after = (count - 1) / (seconds - first) if seconds > first else 0.0
            print(
                f"pipeline: {count:,} images in {seconds:.1f} s = {count / seconds:.1f}/s; first unit after "
                f"{first:.1f} s, {after:.1f}/s from then on; peak {peak:.2f} GiB in workers",
                flush=True,
            )
    count, seconds, first, peak = rows[-1]
    figures = {
        "bench": "embed",
        "efficiency": round(count / seconds / by_hand, 3),
        "ratio_vs_one_at_a_time": round(count / seconds / slow, 2),
        "ratio_vs_stock_runtime": round(chosen / stock, 2),
        "ratio_vs_stock_runtime_bfloat16": round(low / stock, 2),
        "images_per_s": round(count / seconds, 1),
        "start_s": round(first, 1),
        "peak_gib": [round(row[3], 2) for row in rows],
        "images_per_s_after_start": round((count - 1) / max(seconds - first, 1e-9), 1),
        "images": [int(row[0]) for row in rows],
        "quick": QUICK,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
