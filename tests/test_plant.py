"""Planting: a shortcut is drawn, learnt, and found, and a twin without it is not accused."""
import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from dermgan import plant
from dermgan.classify import predict
from dermgan.core import RunMismatch, resolve_run
from dermgan.pcx import choose
from dermgan.store import pack_images


def noise(n, px=32, classes=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(140, 200, (n, 3, px, px), generator=draw).to(torch.uint8)
    labels = torch.arange(n) % classes
    return plant.Copy(images, labels, [f"l{i // 2}" for i in range(n)], np.zeros((n, px, px), bool))


def test_only_the_class_is_marked_and_the_masks_are_the_marks():
    copy = noise(60)
    kept = copy.images.clone()
    marked = plant.plant_on_class(copy, 1, 7)
    changed = (marked.images != kept).any(1).numpy()
    touched = changed.any((1, 2))
    assert torch.equal(copy.images, kept) and not copy.masks.any()
    assert not touched[copy.labels.numpy() != 1].any() and 0.5 < touched[copy.labels.numpy() == 1].mean() < 1
    assert (marked.masks.any((1, 2)) == touched).all() and changed[marked.masks].all()


def test_a_shortcut_is_learnt_and_found(tmp_path):
    run = resolve_run("smoke", 0, root=tmp_path)
    copy, probe, few = noise(120), noise(48, seed=1), noise(12, seed=2)
    every = lambda c: plant.plant(c, np.ones(len(c.labels), bool), 3, "ink")
    ink = plant.plant(copy, (copy.labels == 1).numpy(), 5, "ink")
    model, passes = plant.train(run, ink, 4, 11, lambda model, made: False)
    assert passes == 4 and not model.training
    assert plant.flipped(model, probe, every(probe), 1) > 0.6 and plant.flipped(model, probe, probe, 1) == 0
    told = plant.ask_crp(model, (few, every(few)), (probe, every(probe)), 1, 100, 0)
    assert told["area"] > 0.9 and told["low"] <= told["area"] <= told["high"] and told["best"][1] >= 0.9
    assert plant.train(run, few, 3, 11, lambda model, made: made == 2)[1] == 2


def test_relevance_on_the_mask_against_a_loop():
    draw = np.random.default_rng(2)
    maps, masks = draw.normal(size=(4, 3, 6, 6)), draw.random((4, 6, 6)) < 0.3
    expected = np.zeros(3)
    for i in range(4):
        whole = sum(max(v, 0) for v in maps[i].flatten())
        for c in range(3):
            inside = sum(max(maps[i, c, a, b], 0) for a in range(6) for b in range(6) if masks[i, a, b])
            own = sum(max(v, 0) for v in maps[i, c].flatten())
            expected[c] += (inside - masks[i].sum() / 36 * own) / whole / 4
    assert np.allclose(plant.on_mask(torch.from_numpy(maps), masks), expected, atol=1e-12)
    assert np.allclose(plant.on_mask(torch.ones(4, 3, 6, 6), masks), 0, atol=1e-12)


def test_log_odds_of_components_against_scipy():
    draw = np.random.default_rng(3)
    vectors = np.concatenate([draw.normal(0, 1, (60, 5)), draw.normal(0, 1, (60, 5)) + 7 * np.eye(5)[2]])
    mixture, _ = choose(vectors, 0)
    z, parts = (vectors - mixture.centre) @ mixture.basis, mixture.parts
    assert parts.covariance_type == "diag"
    joint = [np.log(w) + norm.logpdf(z, m, np.sqrt(s)).sum(1) for w, m, s in zip(parts.weights_, parts.means_, parts.covariances_)]
    odds = plant.memberships(mixture, vectors)
    for k in range(len(joint)):
        rest = np.log(sum(np.exp(j) for i, j in enumerate(joint) if i != k))
        assert np.allclose(odds[:, k], joint[k] - rest, atol=1e-8)
    assert max(roc_auc_score(np.arange(120) >= 60, column) for column in odds.T) > 0.98


def test_separation_is_the_area_under_the_curve_and_its_interval_is_paired():
    draw = np.random.default_rng(4)
    base, lesions = draw.normal(size=80) * 5, [f"l{i // 2}" for i in range(80)]
    moved = base + draw.normal(0.2, 0.1, 80)
    assert np.allclose(plant.separate(np.r_[base, base], lesions, 100, 0), 0.5)
    area, low, high = plant.separate(np.r_[base, moved], lesions, 400, 0)
    pairs = [(moved[i] > base[j]) + (moved[i] == base[j]) / 2 for i in range(80) for j in range(80) if lesions[i] != lesions[j]]
    assert np.isclose(area, np.mean(pairs)) and low < area < high < low + 0.03


def test_a_pair_is_read_back_and_one_of_other_data_refused(tmp_path, monkeypatch):
    run = resolve_run("smoke", 0, root=tmp_path)
    for split, seed in (("train", 0), ("val", 1)):
        images = noise(42, seed=seed)
        names = [f"{split}{i}" for i in range(42)]
        pack_images(run.path("lmdb", split, "x").parent, list(images.images.permute(0, 2, 3, 1).numpy()), names,
                    images.labels.tolist(), names, ("A", "B", "C"), 32)
    pair = plant.train_pair(run, noise(42), noise(12, seed=2), 1)
    files = sorted((run.folder / "ckpt" / "plant").glob("*.safetensors"))
    stamps = [file.stat().st_mtime_ns for file in files]
    again = plant.train_pair(run, noise(42), noise(12, seed=2), 1)
    assert len(files) == 2 and [file.stat().st_mtime_ns for file in files] == stamps
    x = noise(8, seed=3).images
    for name in ("planted", "twin"):
        assert torch.equal(predict(getattr(pair, name), x), predict(getattr(again, name), x))
    monkeypatch.setattr(plant, "SHARE", 0.5)
    with pytest.raises(RunMismatch):
        plant.train_pair(run, noise(42), noise(12, seed=2), 1)
