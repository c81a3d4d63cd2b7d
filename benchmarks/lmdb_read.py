"Seconds to read one raw 256 px image from a store: python benchmarks/lmdb_read.py"
import tempfile
import time
from pathlib import Path

import numpy as np
from common import report

from dermgan.store import Images, pack_images


def main(n: int = 1000, image_px: int = 256, repeats: int = 5) -> None:
    draw = np.random.default_rng(0)
    pictures = (draw.integers(0, 256, (image_px, image_px, 3), dtype=np.uint8) for _ in range(n))
    ids = [f"ISIC_{i:07}" for i in range(n)]
    with tempfile.TemporaryDirectory() as folder:
        images = Images(pack_images(Path(folder) / "store", pictures, ids, [0] * n, ids, ("x",), image_px))
        seconds = []
        for _ in range(repeats):
            order = draw.permutation(n)
            begin = time.perf_counter()
            for i in order:
                images[i]
            seconds.append((time.perf_counter() - begin) / n)
    report("lmdb_read", 1000 * float(np.median(seconds)), "ms per 256 px raw image, random order", bound=0.2)


if __name__ == "__main__":
    main()
