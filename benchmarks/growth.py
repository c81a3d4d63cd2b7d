"""How a GAN step's time and memory grow with image size and batch, and a store's with the data set's size.

    python benchmarks/growth.py [--axis image_px|batch|data]... [--again]

Points that results/growth.json holds are kept, so that a killed run goes on where it stopped; --again measures all anew. Times are
processor seconds of all threads, which a busy machine disturbs little; memory is what a fresh process needs above its state.
Image sizes: two images on the paper's network (channel base 32768), 32 to 512 px. Batches: 2 to 32 images on `ham`'s network (base 4096)
at 64 px. Both in bfloat16, an average step with R1 every 16th and path length every 4th time, timed after one to warm up. A store holds
250 to 16,000 raw images of 64 px, read in random order.
"""
import argparse
import json
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

from common import RESULTS, hardware

import numpy as np
import torch

from dermgan.core import CLASSES, read_profile
from dermgan.cost import exponent, measure, memory_now, step_seconds
from dermgan.store import Images, pack_images

FILE = RESULTS / "growth.json"
POINTS = {"image_px": (32, 64, 128, 256, 512), "batch": (2, 4, 8, 16, 32), "data": (250, 1000, 4000, 16000)}


def step(profile: str, image_px: int, batch: int) -> dict:
    "Processor seconds of an average step, and its peak above the state, of a profile's network with the paper's regularisers."
    paper = read_profile("paper")
    p = replace(read_profile(profile), gan_batch=batch, gan_pl_weight=paper.gan_pl_weight, gan_pl_every=paper.gan_pl_every)
    found = measure(p, batch, "bf16", repeats=1, px=image_px)
    peak = max(body["peak"] for body in found["bodies"].values())
    return {"seconds": batch * sum(step_seconds(found, p, "cpu_seconds").values()), "peak": peak, "held": found["held"],
            "bytes": peak - found["held"]}


def store(count: int, px: int = 64, reads: int = 2000) -> dict:
    "Processor seconds to read an image of a store, and the bytes of its file and of an epoch's order."
    draw = np.random.default_rng(0)
    ids = [f"ISIC_{i:07}" for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        pictures = (draw.integers(0, 256, (px, px, 3), dtype=np.uint8) for _ in range(count))
        images = Images(pack_images(Path(folder) / "store", pictures, ids, [0] * count, ids, CLASSES, px))
        size, order, times = (Path(folder) / "store" / "data.mdb").stat().st_size, draw.integers(0, count, reads), []
        before = memory_now("cpu")["now"]
        for _ in range(5):
            begin = time.process_time()
            for i in order:
                images.batch([i])
            times.append((time.process_time() - begin) / reads)
    return {"seconds": float(np.median(times)), "bytes": size, "resident": memory_now("cpu")["now"] - before}


def keep(points: list[dict]) -> None:
    "Write the points; the value in the table of benchmarks is the exponent of a step's time with the image side."
    sides = [(point["x"], point["seconds"]) for point in points if point["axis"] == "image_px"]
    value = round(exponent(*zip(*sides))[0], 3) if len(sides) > 2 else None
    line = {"name": "growth", "value": value, "unit": "exponent of a step's CPU time with the image side, 32 to 512 px", "bound": None,
            "hardware": hardware(), "date": date.today().isoformat(), "amx_bf16": torch.cpu._is_amx_tile_supported(), "precision": "bf16"}
    FILE.write_text(json.dumps(line | {"points": points}, indent=1) + "\n")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--axis", action="append", choices=list(POINTS))
    words.add_argument("--again", action="store_true")
    options = words.parse_args()
    kept = [] if options.again or not FILE.is_file() else json.loads(FILE.read_text())["points"]
    done = {(point["axis"], point["x"]) for point in kept}
    for axis in options.axis or POINTS:
        for x in POINTS[axis]:
            if (axis, x) in done:
                continue
            made = store(x) if axis == "data" else step(*(("paper", x, 2) if axis == "image_px" else ("ham", 64, x)))
            kept.append({"axis": axis, "x": x} | {k: round(v, 7) for k, v in made.items()})
            keep(kept)
            print(json.dumps(kept[-1]), flush=True)


if __name__ == "__main__":
    main()
