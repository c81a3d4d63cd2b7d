"""A person's own photographs: a folder a class and one command, through the notebooks that read, plan, train and factorize."""
import shutil

import numpy as np
import pandas as pd
from PIL import Image

from dermgan.core import resolve_run
from dermgan.store import Images
from dermgan.stylegan2 import load_generator

CLASSES, EACH = ("mole", "scar", "wart"), 24


def photographs(root):
    "Discs on skin, a colour a class, as JPEG files of several sizes; and one that is none."
    draw = np.random.default_rng(0)
    for c, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for k in range(EACH):
            px = 48 + 8 * (k % 3)
            y, x = np.mgrid[:px, :px] / px - 0.5
            disc = (x**2 + y**2 < draw.uniform(0.03, 0.09))[..., None]
            picture = np.where(disc, [90 + 40 * c, 60, 40], [210, 170, 150]) + draw.normal(0, 8, (px, px, 3))
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(root / name / f"{name}{k}.jpg")
    (root / CLASSES[0] / "broken.jpg").write_bytes(b"no picture")
    return root


def test_a_folder_of_photographs_is_planned_learnt_and_factorized(reproduce, tmp_path):
    data = photographs(tmp_path / "photographs")
    run = resolve_run("smoke", 0, {"dataset": "folder"}, data)
    shutil.rmtree(run.folder, ignore_errors=True)
    done = reproduce("--profile", "smoke", "--set", "dataset=folder", "--data", str(data), "--until", "06_factorize")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    stores = {name: Images(run.folder / "lmdb" / name) for name in ("train", "val", "holdout")}
    assert all(store.classes == CLASSES and set(store.labels.tolist()) == {0, 1, 2} for store in stores.values())
    ids = [name for store in stores.values() for name in store.ids]
    refused = pd.concat(pd.read_csv(run.folder / "lmdb" / name / "rejected.csv") for name in stores)
    assert len(ids) == len(set(ids)) == len(CLASSES) * EACH and len(refused) == 1 and "broken" in refused.iloc[0].to_string()
    assert load_generator(run.folder / "ckpt" / "generator.safetensors").num_ws == 8
    assert (run.folder / "nbs" / "06_factorize.ipynb").is_file() and not (run.folder / "nbs" / "07_invert.ipynb").exists()
