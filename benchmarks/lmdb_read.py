"""Reading 256 px images in random order: our raw store beside rosinality's JPEG one, and our JPEG store, in turns.

Their images are packed as `prepare_data.py` packs them (JPEG, quality 100) and read by their `dataset.py` from a checkout, or by the same few
lines restated here; each image ends as a uint8 tensor [3, H, W] on both sides. Times are CPU time: the file is in the page cache.

    python benchmarks/lmdb_read.py [--repeats 5] [--peer DIR]...
"""
import argparse
import io
import sys
import tempfile
from pathlib import Path

from common import peers, report, turns, versus

import lmdb
import numpy as np
import torch
from PIL import Image


def as_bytes(image: Image.Image) -> torch.Tensor:
    "The decoded picture as a tensor."
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Restated:
    "Images as rosinality's `MultiResolutionDataset` reads them."

    def __init__(self, path: str, transform, resolution: int):
        self.env, self.transform, self.px = lmdb.open(path, readonly=True, lock=False, readahead=False, meminit=False), transform, resolution

    def __getitem__(self, index: int):
        with self.env.begin() as transaction:
            value = transaction.get(f"{self.px}-{index:05}".encode())
        return self.transform(Image.open(io.BytesIO(value)))


def theirs(folder: Path, pictures: np.ndarray, checkout: Path | None):
    "Their store and their reader."
    px = pictures.shape[1]
    with lmdb.open(str(folder), map_size=2**30) as env, env.begin(write=True) as transaction:
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(buffer := io.BytesIO(), format="jpeg", quality=100)
            transaction.put(f"{px}-{i:05}".encode(), buffer.getvalue())
        transaction.put(b"length", str(len(pictures)).encode())
    if not checkout:
        return Restated(str(folder), as_bytes, px)
    sys.path.insert(0, str(checkout))
    from dataset import MultiResolutionDataset
    return MultiResolutionDataset(str(folder), as_bytes, px)


def main(n: int = 256, image_px: int = 256) -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--repeats", type=int, default=5)
    words.add_argument("--peer", action="append", default=[], metavar="DIR")
    options = words.parse_args()
    from dermgan.phantom import sample
    from dermgan.store import Images, pack_images
    pictures = np.ascontiguousarray(sample(n, image_px).images.transpose(0, 2, 3, 1))
    ids, checkout = [f"ISIC_{i:07}" for i in range(n)], peers("rosinality", options.peer)
    order = np.random.default_rng(0).permutation(n).tolist()
    with tempfile.TemporaryDirectory() as folder:
        stores = {kind: Images(pack_images(Path(folder) / kind, pictures, ids, [0] * n, ids, ("x",), image_px, kind))
                  for kind in ("raw", "jpeg")}
        stores["rosinality"] = theirs(Path(folder) / "theirs", pictures, checkout)
        works = {kind: lambda store=store: [store[i] for i in order] for kind, store in stores.items()}
        took = turns(works, options.repeats, scale=1000 / n)
        size = {kind: round((Path(folder) / place / "data.mdb").stat().st_size / n) for kind, place in
                (("raw", "raw"), ("jpeg", "jpeg"), ("rosinality", "theirs"))}
    report("lmdb_read", took["raw"], "CPU-ms per 256 px raw image, random order", 0.2, bytes_per_image=size["raw"])
    reader = "their dataset.py" if checkout else "restated"
    versus("lmdb_read_to_rosinality", took["raw"], took["rosinality"], "rosinality", "CPU-ms per 256 px image", 1.0, reader=reader,
           bytes_per_image=size["rosinality"])
    versus("lmdb_read_jpeg_to_rosinality", took["jpeg"], took["rosinality"], "rosinality", "CPU-ms per 256 px image", reader=reader,
           bytes_per_image=size["jpeg"])


if __name__ == "__main__":
    main()
