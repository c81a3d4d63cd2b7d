"Phantom images a second on one core: 64 px (bound 500), and 32, 128 and 256 px for orientation."
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import time

from common import report, seconds

import torch

from dermgan.phantom import sample

torch.set_num_threads(1)


def rate(image_px: int, n: int) -> float:
    "Images a second of processor time, median of five batches after one to warm up."
    sample(n, image_px)
    return n / seconds(lambda: sample(n, image_px, seed=1), repeats=5, clock=time.process_time)


if __name__ == "__main__":
    others = {f"{px}_px": round(rate(px, n), 1) for px, n in ((32, 512), (128, 64), (256, 16))}
    report("phantom_render", rate(64, 512), "images/s of processor time, 64 px, one core", 500, **others)
