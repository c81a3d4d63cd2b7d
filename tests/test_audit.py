"""Whom the synthetic images know: strays planted at every link, and remembered photographs planted among new ones."""
import json

import numpy as np
import pandas as pd
import pytest
import torch

from dermgan import audit
from dermgan.core import CLASSES, DataRefused, resolve_run, rng
from dermgan.metrics import open_lpips
from dermgan.store import Images, pack_images


def pictures(count, seed, px=32):
    return list(np.random.default_rng(seed).integers(0, 256, (count, px, px, 3), dtype=np.uint8))


def put_store(run, name, ids, lesions, seed=0):
    pack_images(run.path("lmdb", name), pictures(len(ids), seed), ids, [k % 7 for k in range(len(ids))], lesions, CLASSES, 32)


@pytest.fixture
def run(tmp_path):
    "A run with real stores, a synthetic store, its table and a cell: all of it descends from train."
    run = resolve_run("smoke", 0, {}, root=tmp_path)
    for k, split in enumerate(("train", "val", "holdout", "test")):
        put_store(run, split, [f"{split}{i}" for i in range(20)], [f"{split}-l{i // 2}" for i in range(20)], k)
    made = pd.DataFrame({"image_id": [f"train{i}-SV+" for i in range(20)], "source_id": [f"train{i}" for i in range(20)],
                         "lesion_id": [f"train-l{i // 2}" for i in range(20)], "kept": True})
    made.to_csv(run.path("tables", "synthetic.csv"), index=False)
    put_store(run, "synthetic", made.image_id.tolist(), made.lesion_id.tolist(), 9)
    run.path("ckpt", "classify", "net-2k-plain-s0.json").write_text(json.dumps({"synthetic": made.image_id[:5].tolist()}))
    return run


def test_a_clean_run_has_no_strays_at_any_link(run):
    links = audit.check_descent(run)
    assert links.value.eq(0).all() and links.n.tolist() == [20, 20, 20, 5]
    assert links.link.tolist() == ["real: train against the other parts", "store synthetic", "table synthetic.csv", "cell net-2k-plain-s0"]


@pytest.mark.parametrize("split", ["val", "holdout", "test"])
@pytest.mark.parametrize("link", ["store", "control store", "table", "source only", "cell", "cell of a photograph", "leaking split"])
def test_a_stray_at_any_link_from_any_part_is_refused(run, link, split):
    frame = pd.read_csv(run.path("tables", "synthetic.csv"), dtype=str)
    expected = f"{split}"
    if link in ("store", "control store"):
        name = "synthetic" if link == "store" else "random"
        put_store(run, name, ["a", "b"], ["train-l0", f"{split}-l3"], 5)
        if link == "store":
            run.path("ckpt", "classify", "net-2k-plain-s0.json").unlink()
    elif link == "table":
        frame.loc[7, "lesion_id"] = f"{split}-l1"
        frame.to_csv(run.path("tables", "synthetic.csv"), index=False)
    elif link == "source only":
        frame.loc[7, "source_id"] = f"{split}3"
        frame.to_csv(run.path("tables", "synthetic.csv"), index=False)
        expected = f"its source is in {split}"
    elif link == "cell":
        put_store(run, "random", ["z"], [f"{split}-l2"], 6)
        run.path("ckpt", "classify", "net-random-plain-s0.json").write_text(json.dumps({"synthetic": ["z"]}))
    elif link == "cell of a photograph":
        run.path("ckpt", "classify", "net-2k-plain-s1.json").write_text(json.dumps({"synthetic": [f"{split}0"]}))
    else:
        put_store(run, split, [f"{split}{i}" for i in range(20)], ["train-l4", *(f"{split}-l{i // 2}" for i in range(1, 20))], 3)
    with pytest.raises(DataRefused, match=expected) as error:
        audit.check_descent(run)
    assert len(str(error.value).splitlines()) == 3


def test_an_image_of_no_known_lesion_or_of_another_than_its_sources_is_refused(run):
    frame = pd.read_csv(run.path("tables", "synthetic.csv"), dtype=str)
    frame.assign(lesion_id=frame.lesion_id.shift(2).fillna("train-l9")).to_csv(run.path("tables", "synthetic.csv"), index=False)
    with pytest.raises(DataRefused, match="another lesion"):
        audit.check_descent(run)
    run.path("ckpt", "classify", "net-2k-plain-s0.json").write_text(json.dumps({"synthetic": ["nobody"]}))
    frame.to_csv(run.path("tables", "synthetic.csv"), index=False)
    with pytest.raises(DataRefused, match="nowhere"):
        audit.check_descent(run)


def test_the_search_is_the_slow_one_in_both_spaces(run):
    train, asked = Images(run.folder / "lmdb" / "train"), torch.from_numpy(np.stack(pictures(9, 40))).permute(0, 3, 1, 2)
    lpips = open_lpips(None)
    for space in (audit.pixel_vectors, audit.lpips_vectors(lpips)):
        known, query = (audit.vectors(x, space).double() for x in (train, asked))
        slow = (query[:, None] - known[None]).square().sum(2)
        found = audit.search({"new": (asked, None)}, train, space)["new"]
        mirrored = (audit.vectors(asked, space, True).double()[:, None] - known[None]).square().sum(2)
        both = torch.minimum(slow, mirrored)
        assert np.allclose(found.distance, both.min(1).values, rtol=1e-4)
        assert found.place.tolist() == both.argmin(1).tolist()
    grey = torch.nn.functional.interpolate(asked.float() / 127.5 - 1, (64, 64), mode="bilinear", antialias=True).clamp(-1, 1)
    whole = torch.nn.functional.interpolate(train.all().float() / 127.5 - 1, (64, 64), mode="bilinear", antialias=True).clamp(-1, 1)
    with torch.no_grad():
        expected = lpips(grey, whole[:9], "last3")
    a, b = audit.vectors(asked, audit.lpips_vectors(lpips)), audit.vectors(train, audit.lpips_vectors(lpips))[:9]
    assert torch.allclose((a - b).square().sum(1), expected, rtol=1e-4)


def test_a_remembered_photograph_is_found_also_in_the_mirror_and_never_in_its_own_lesion(run):
    train = Images(run.folder / "lmdb" / "train")
    copies = torch.cat([train.batch([4]), train.batch([11]).flip(3)])
    found = audit.search({"copies": (copies, None), "barred": (copies, np.array(["train-l2", "train-l5"]))}, train, audit.pixel_vectors)
    assert found["copies"].place.tolist() == [4, 11] and np.allclose(found["copies"].distance, 0) and found["copies"].mirrored.tolist() == [False, True]
    assert not set(found["barred"].place) & {4, 5, 10, 11} and found["barred"].distance.min() > 0.01


def test_the_share_that_is_very_near_holds_its_level_and_finds_a_tenth_that_was_remembered():
    hits, caught = 0, 0
    for trial in range(120):
        draw = np.random.default_rng([1, trial])
        fresh, new = draw.gamma(9, 1, 300), draw.gamma(9, 1, 250)
        low = audit.compare_distances(new, fresh, 200, trial)[2][2]
        hits += low > 0.05
        caught += audit.compare_distances(np.where(np.arange(250) < 25, 0.01, new), fresh, 200, trial)[2][2] > 0.05
    assert hits <= 12 and caught >= 100


def test_samples_are_drawn_once_and_repeat(run):
    train = Images(run.folder / "lmdb" / "train")
    places = audit.some_of(train, 7, 3)
    assert len(set(places)) == 7 and (np.diff(places) > 0).all() and np.array_equal(places, audit.some_of(train, 7, 3))
    assert len(audit.some_of(train, 99, 3)) == 20

    class Net(torch.nn.Module):
        z_dim = 4

        def forward(self, z, noise):
            return z[:, :3, None, None].tanh().expand(-1, 3, 8, 8)
    images = audit.generated(Net(), 70, 0)
    z = torch.randn(64, 4, generator=rng(0, "audit generated"))
    assert images.shape == (70, 3, 8, 8) and images.dtype == torch.uint8 and abs(int(images[0, 0, 0, 0]) - (z[0, 0].tanh() + 1) * 127.5) <= 1


def test_before_the_cells_are_done_only_what_is_done_is_asked(run):
    run.path("ckpt", "classify", "net-2k-plain-s1.json").write_text(json.dumps({"synthetic": ["holdout0"]}))
    put_store(run, "random", ["z"], ["test-l2"], 6)
    assert audit.check_descent(run, every=False).n.tolist() == [20, 20, 20]
    with pytest.raises(DataRefused):
        audit.check_descent(run)
