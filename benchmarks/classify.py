"""The classifier: DenseNet121's training step at 64 px, what decoding costs beside it, and the size of the transformed set.

Our step (augmentation, bf16 or fp32 by measurement, channels last, fused Adam) and torchvision's network in plain fp32 with torch's default
Adam take turns in one process, so that a busy machine is busy for both. Times are CPU seconds of all threads; wall-clock rates stand beside them.

    python benchmarks/classify.py [--repeats 5] [--data DIR]    DIR: HAM10000, for the bytes of real images at 256 px
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")   # threads that spin on a busy machine count as work

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from common import report, turns

import numpy as np
import torch
from torch.nn import functional as F

BATCH, PX, PAPER = 32, 64, 50_075
PROFILE = SimpleNamespace(precision="auto", image_px=PX, cls_batch=BATCH, cls_cutout=0.25, cls_lr=1e-5, cls_dropout=0.1,
                          cls_weight_decay=1e-4, cls_pretrained="none")


def ours(images, labels):
    "A step as `dermgan.classify` takes it, in the precision that it picks."
    from dermgan import classify
    run = SimpleNamespace(profile=PROFILE, weights=None)
    precision, seconds = classify.pick_precision(run, "densenet121", 7)
    fit = classify.begin(run, "densenet121", 7, 0, precision)
    return lambda: classify.train_step(fit, images, labels, PROFILE.cls_cutout, 0), precision, seconds


def plain(images, labels):
    "Forward, backward and Adam of torchvision's DenseNet121 as it comes."
    from dermgan.core import import_torchvision
    net = import_torchvision().models.densenet121(weights=None, num_classes=7, drop_rate=0.1).train()
    adam = torch.optim.Adam(net.parameters(), 1e-5, weight_decay=1e-4)
    x = images.float() / 127.5 - 1

    def step():
        adam.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        adam.step()
    return step


def pictures(image_px: int, count: int, data: Path | None) -> tuple[list, str]:
    "Lesions to encode: real ones where they are at hand, else phantoms."
    from dermgan.phantom import sample
    from dermgan.store import read_image, square
    if data:
        files = sorted((data / "images").glob("*.jpg"))
        return [square(read_image(files[i]), image_px) for i in range(0, len(files), max(1, len(files) // count))][:count], "HAM10000"
    return list(sample(count, image_px).images.transpose(0, 2, 3, 1)), "phantom"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", type=Path)
    given, draw = parser.parse_args(), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, PX, PX), generator=draw, dtype=torch.uint8)
    labels = torch.arange(BATCH) % 7
    step, precision, seconds = ours(images, labels)
    both = lambda: np.array([time.perf_counter(), time.process_time()])
    took, load = turns({"ours": step, "plain": plain(images, labels)}, given.repeats, both), os.getloadavg()[0]
    rate = {name: round(BATCH / statistics.median(wall for wall, _ in rows), 1) for name, rows in took.items()}
    times = {name: [1000 * used / BATCH for _, used in rows] for name, rows in took.items()}
    cpu = {name: round(statistics.median(each), 2) for name, each in times.items()}
    shared = {"load": round(load, 1), "precision": precision}
    report("classify_step", times["ours"], "CPU-ms per image, DenseNet121, 64 px, batch 32; 33.3 is 60 images/s on 2 cores", bound=33.3,
           plain=cpu["plain"], images_per_s=rate, seconds_of_a_step=seconds, **shared)
    report("classify_ratio", [b / a for a, b in zip(times["ours"], times["plain"])], "times as fast as plain fp32 torchvision, CPU seconds", 1.5,
           "higher", wall=round(rate["ours"] / rate["plain"], 2), **shared)
    sizes(given.data, cpu["ours"])


def sizes(data: Path | None, step_ms: float) -> None:
    "Bytes and decoding time of JPEG stores at 64 and 256 px."
    from dermgan.store import Images, pack_images
    for px, count in ((PX, 400), (256, 400)):
        shown, what = pictures(px, count, data)
        ids = [f"ISIC_{i:07}-SPV+" for i in range(len(shown))]
        with tempfile.TemporaryDirectory() as folder:
            store = pack_images(Path(folder) / "store", shown, ids, [0] * len(shown), ids, ("x",), px, "jpeg")
            whole = Images(store)
            whole.all()
            begin = time.process_time()
            for first in range(0, len(shown), BATCH):
                whole.batch(range(first, min(first + BATCH, len(shown))))
            decode = 1000 * (time.process_time() - begin) / len(shown)
            size = (store / "data.mdb").stat().st_size / len(shown)
        more = {"share_of_a_step": round(decode / step_ms, 4)} if px == PX else {}
        report(f"classify_decode_{px}", decode, f"CPU-ms to read and decode one {px} px JPEG", images=what, **more)
        report(f"classify_store_{px}", size * PAPER / 2**30, f"GiB for {PAPER:,} images at {px} px as JPEG (quality 95, 4:4:4)",
               bound=2 if px == 256 else None, bytes_per_image=round(size), raw=round(3 * px * px * PAPER / 2**30, 2), images=what,
               n=len(shown))


if __name__ == "__main__":
    main()
