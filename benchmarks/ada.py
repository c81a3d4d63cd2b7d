"""What adaptive augmentation changes: the same networks at 64 px on 1,000 and on all training images, with and without it.

Every cell of the study sees the same number of images. At each tick the Frechet distance to validation images, the discriminator's
overfitting and p are noted; `results/ada.csv` collects them and `04_ada` draws them. A killed study goes on where it stopped: run the
same command again. On two cores, run one size on each at the same time, with OMP_NUM_THREADS=1:

    python benchmarks/ada.py --data DIR --weights DIR [--size few|all] [--kimg 80] [--few 1000] [--pipe geometry+mild] [--profile quick]

What is kept was made with `--kimg 100 --tick 5 --set dataset=ham10000 gan_fd_images=2000 gan_batch=16 gan_lr=0.0025 gan_r1_gamma=0.0512
gan_ema_kimg=10`, a size on each core, in 50 minutes. `--profile smoke --set dataset=phantom --kimg 0.64 --few 40 --out FILE` tries it on phantoms in a minute.
"""
import argparse
import json
import os
from pathlib import Path

from common import RESULTS, hardware

import pandas as pd

from dermgan.core import read_run, resolve_run, write_text
from dermgan.data import pack_data
from dermgan.gan import batch_indices, train_gan
from dermgan.metrics import open_extractor
from dermgan.phantom import pack_phantom
from dermgan.store import Images, open_store, pack_images

COLUMNS = ["images", "pipe", "p", "seed", "step", "kimg", "distance", "overfitting", "augment_p", "sign_real", "features", "hardware"]


def data_of(options, root: Path):
    "A run that holds the packed images; packing goes on where it stopped."
    run = resolve_run(options.profile, options.seed, dict(options.set), options.data, options.weights, root=root / "data")
    pack_phantom(run) if run.profile.dataset == "phantom" else pack_data(run)
    return run


def few_of(run, count: int) -> Path:
    "A store of some training images, the first of the training's own order."
    whole = Images(run.folder / "lmdb" / "train")
    chosen = batch_indices(len(whole), count, run.seed, 0)
    pictures = (whole.batch([i])[0].permute(1, 2, 0).numpy() for i in chosen)
    return pack_images(run.folder / "lmdb" / f"train-{count}", pictures, [whole.ids[i] for i in chosen], whole.labels[chosen].tolist(),
                       [whole.lesion_ids[i] for i in chosen], whole.classes, whole.image_px, run.profile.store)


def cell(options, root: Path, data, train: Path, pipe: str, p: str):
    "The run of one cell, with its stores."
    changes = dict(options.set) | {"gan_kimg": options.kimg, "gan_tick_kimg": options.tick or options.kimg / 16, "gan_aug": pipe, "gan_split": "train",
               "gan_aug_kimg": options.aug_kimg or options.kimg, "gan_aug_p": p}
    run = resolve_run(options.profile, options.seed, {k: str(v) for k, v in changes.items()}, options.data, options.weights, root=root / train.name)
    stores = run.folder / "lmdb"
    stores.mkdir(exist_ok=True)
    for name, target in (("train", train), ("val", data.folder / "lmdb" / "val")):
        if not (stores / name).exists():
            os.symlink(target.resolve(), stores / name)
    return run


def ticks_of(options, run, count: int, pipe: str, p: str, features: str) -> list[dict]:
    "What a cell has measured so far; the sign is the mean since the measurement before."
    if not (stats := run.path("stats.jsonl")).is_file():
        return []
    rows, signs = [], []
    facts = {"pipe": pipe, "p": p, "seed": options.seed, "images": count, "features": features, "hardware": hardware()}
    for line in map(json.loads, stats.read_text().splitlines()):
        signs.append(line["sign_real"])
        if "distance" in line and (not rows or line["kimg"] - rows[-1]["kimg"] > rows[0]["kimg"] / 2):  # not twice at the end
            rows.append({"augment_p": 0.0} | line | facts | {"sign_real": sum(signs) / len(signs)})
            signs = []
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of HAM10000")
    parser.add_argument("--weights", help="folder of the feature network's weights")
    parser.add_argument("--profile", default="quick", help="sizes of the networks")
    parser.add_argument("--set", nargs="*", type=lambda text: text.split("=", 1), default=[("dataset", "ham10000"), ("gan_fd_images", "2000")])
    parser.add_argument("--size", choices=("few", "all"), help="train the cells of one size only (default: both)")
    parser.add_argument("--kimg", type=float, default=80, help="thousand images that each cell sees")
    parser.add_argument("--tick", type=float, help="thousand images between measurements (default: a sixteenth of --kimg)")
    parser.add_argument("--aug-kimg", type=float, help="thousand images in which p could go from 0 to 1 (default: --kimg; ADA's own is 500)")
    parser.add_argument("--few", type=int, default=1000, help="images of the small training set")
    parser.add_argument("--pipe", default="geometry+mild", help="what may be applied")
    parser.add_argument("--fixed", help="a third cell of each size: the pipe with this p throughout, for what augmentation does where the controller does not act")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, default=RESULTS.parents[1] / "runs" / "ada", help="where the trainings lie")
    parser.add_argument("--out", type=Path, default=RESULTS / "ada.csv")
    options = parser.parse_args()
    data = data_of(options, options.root)
    stores = {"few": few_of(data, options.few), "all": data.folder / "lmdb" / "train"}
    kinds = [("none", "adaptive"), (options.pipe, "adaptive"), *([(options.pipe, options.fixed)] if options.fixed else [])]
    cells = [(size, len(Images(train)), *kind, cell(options, options.root, data, train, *kind)) for size, train in stores.items() for kind in kinds]
    features = open_extractor(data.weights).name
    for size, count, pipe, p, run in cells:
        if options.size in (None, size):
            open_store.cache_clear()
            train_gan(read_run(run.folder))
            ticks = ticks_of(options, run, count, pipe, p, features)
            print(f"{count} images, {pipe}, p {p}: best {features} {min(t['distance'] for t in ticks):.4g}, last {ticks[-1]['distance']:.4g}, "
                  f"overfitting {ticks[-1]['overfitting']:.2f}", flush=True)
            rows = [tick for _, count, pipe, p, run in cells for tick in ticks_of(options, run, count, pipe, p, features)]
            write_text(options.out, pd.DataFrame(rows)[COLUMNS].to_csv(index=False, float_format="%.6g"))


if __name__ == "__main__":
    main()
