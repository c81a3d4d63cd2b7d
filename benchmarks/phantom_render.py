"Phantom images a second on one core: 64 px (bound 500), and 32, 128 and 256 px for orientation."
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import statistics
import time

from common import report, samples

import torch

from dermgan.phantom import sample

torch.set_num_threads(1)


def rates(image_px: int, n: int) -> list[float]:
    "Images a second of processor time, of five batches after one to warm up."
    sample(n, image_px)
    return [n / s for s in samples(lambda: sample(n, image_px, seed=1), 5, time.process_time)]


if __name__ == "__main__":
    others = {f"{px}_px": round(statistics.median(rates(px, n)), 1) for px, n in ((32, 512), (128, 64), (256, 16))}
    report("phantom_render", rates(64, 512), "images/s of processor time, 64 px, one core", 500, "higher", **others)
