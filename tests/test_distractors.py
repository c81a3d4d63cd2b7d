"""Shares of relevance, paired intervals, masks, detectors and flipping curves, against loops."""
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dermgan import distractors as d
from dermgan.classify import build
from dermgan.core import DataMissing
from dermgan.lrp import attribute


@pytest.fixture(scope="module")
def net():
    return build("densenet_small").eval()


def blobs(n=6, px=40, seed=0):
    draw, at = np.random.default_rng(seed), np.mgrid[:px, :px]
    return np.stack([np.hypot(*(at - draw.uniform(8, 32, (2, 1, 1)))) < draw.uniform(4, 14) for _ in range(n)])


def test_places_are_a_partition_and_the_ring_hugs_the_edge():
    masks = np.concatenate([blobs(), np.zeros((1, 40, 40), bool), np.ones((1, 40, 40), bool)])
    regions = d.places(masks)
    assert (sum(regions[name].astype(int) for name in d.PLACES) == 1).all() and (regions["lesion"] == masks).all()
    at = np.argwhere(np.ones((40, 40), bool))
    for mask, ring in zip(masks[:3], regions["border"]):
        inside, outside = np.argwhere(mask), np.argwhere(~mask)
        for y, x in at[::17]:
            other = outside if mask[y, x] else inside
            assert ring[y, x] == (np.hypot(*(other - (y, x)).T).min() <= 2)
    assert not regions["border"][6:].any() and regions["interior"][7].all() and not regions["skin"][7].any()


def test_shares_against_a_loop():
    draw, masks = np.random.default_rng(1), blobs()
    relevance = draw.normal(size=masks.shape)
    hair = masks & (np.arange(6) < 3)[:, None, None]
    frame = d.shares(relevance, d.places(masks) | {"hair": hair})
    for i in range(6):
        whole = sum(abs(v) for v in relevance[i].flatten())
        assert np.isclose(frame.lesion[i], sum(abs(v) for v in relevance[i][masks[i]]) / whole)
    assert np.allclose(frame[list(d.PLACES)].sum(axis=1), 1) and frame.hair.isna().tolist() == [False] * 3 + [True] * 3
    assert np.allclose(d.shares(-3 * relevance, d.places(masks)), frame.drop(columns="hair"))
    assert d.shares(relevance * 0, d.places(masks)).isna().all(axis=None)


def test_differences_are_paired_and_holes_do_not_count():
    draw, n = np.random.default_rng(2), 90
    labels, lesions = np.repeat([0, 1, 2], 30), [f"l{i // 3}" for i in range(n)]
    base = pd.DataFrame({"skin": draw.random(n), "hair": np.where(np.arange(n) % 9 < 2, 0.2, np.nan)})
    base.loc[labels == 2, "hair"] = np.nan
    frame = d.compare({"baseline": base, "SA-6k": base + 0.03}, base * 0 + 0.4, labels, lesions, ("A", "B", "C"), 200, 0)
    gap = frame[frame.model == "SA-6k minus baseline"]
    assert np.allclose(gap[["value", "low", "high"]].dropna(), 0.03)
    own = frame[(frame.model == "baseline") & (frame.region == "skin")].set_index("class")
    assert np.isclose(own.value["A"], base.skin[:30].mean()) and own.low["A"] < own.value["A"] < own.high["A"]
    assert np.isclose(own.value["average"], own.value[["A", "B", "C"]].mean()) and np.isclose(own["area"]["B"], 0.4)
    hair = frame[(frame.model == "baseline") & (frame.region == "hair")]
    assert hair["class"].tolist() == ["A", "B", "average"] and hair.n.sum() == 2 * base.hair.notna().sum()
    weights = draw.integers(0, 3, (5, n)).astype(float)
    loop = [sum(w[i] * base.hair[i] for i in range(n) if base.hair[i] == base.hair[i]) / sum(w[i] for i in range(n) if base.hair[i] == base.hair[i]) for w in weights]
    assert np.allclose(d.weighted_means(base.hair.to_numpy(), weights), loop)


def test_masks_are_squared_as_images_are_and_missing_ones_counted(tmp_path):
    home = tmp_path / "HAM10000" / "masks"
    home.mkdir(parents=True)
    mask = np.zeros((60, 90), np.uint8)
    mask[20:40, 30:60] = 255
    Image.fromarray(mask).save(home / "ISIC_1_segmentation.png")
    got = d.read_masks(tmp_path, ["ISIC_1"], 60)
    assert got.shape == (1, 60, 60) and (got[0] == (mask[:, 15:75] > 127)).all()
    with pytest.raises(DataMissing) as error:
        d.read_masks(tmp_path, ["ISIC_1", "ISIC_2", "ISIC_3"], 60)
    assert "2 of 3" in str(error.value) and len(str(error.value).splitlines()) == 3
    for folder in (None, tmp_path / "masks"):
        with pytest.raises(DataMissing):
            d.read_masks(folder, ["ISIC_1"], 60)


@pytest.mark.parametrize("turn", range(4))
def test_a_hair_is_seen_in_any_direction_and_a_dot_is_not(turn):
    image = np.full((1, 3, 48, 48), 190, np.uint8)
    image[0, :, 10, 5:40] = 70
    image[0, :, 30:32, 30:32] = 70
    found = d.dark_lines(np.rot90(image, turn, (2, 3)).copy())
    back = np.rot90(found, -turn, (1, 2))[0]
    assert (back[10, 8:37] > 100).all() and back[20, 20] == 0 and back[28:34, 28:34].max() == 0
    assert np.allclose(d.dark_lines(image + 20), d.dark_lines(image))


def test_darkness_asks_all_four_corners():
    image = np.full((2, 3, 40, 40), 200, np.uint8)
    image[0, :, :6, :6] = 0
    image[1, :, np.hypot(*(np.mgrid[:40, :40] - 19.5)) > 21] = 0
    dark = d.darkness(image)
    assert np.isclose(dark[0], 1 - 200 / 255) and dark[1] == 1


def test_a_silenced_channel_is_zero_and_no_hook_stays(net):
    x, y = torch.rand(3, 3, 32, 32) * 2 - 1, torch.tensor([0, 1, 2])
    before = d.chances(net, x, y)
    keep = torch.ones(3, 75)
    keep[0] = 0
    with pytest.raises(KeyboardInterrupt):
        with d.silenced(net, d.DEFAULT, keep):
            muted = d.chances(net, x, y)
            raise KeyboardInterrupt
    assert not np.isclose(muted[0], before[0], atol=1e-9) and np.allclose(muted[1:], before[1:], atol=1e-6)
    assert np.array_equal(d.chances(net, x, y), before) and not any(p._forward_hooks for p in net.modules())


def test_flipping_begins_whole_ends_empty_and_goes_by_relevance(net, monkeypatch):
    x, y = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.tensor([3, 4])
    seen = []
    monkeypatch.setattr(d, "chances", lambda model, images, targets: seen.append(images.clone()) or np.zeros(len(images)))
    d.flip_pixels(net, x, y, 0, cells=8)
    by_relevance = seen[:len(d.STEPS)]
    heat = attribute(net, x, y).sum(1)
    for i in range(2):
        patches = {(a, b): float(heat[i, 4 * a:4 * a + 4, 4 * b:4 * b + 4].sum()) for a in range(8) for b in range(8)}
        for step, images in zip(d.STEPS, by_relevance):
            gone = {(a, b) for a, b in patches if not torch.equal(images[i, :, 4 * a:4 * a + 4, 4 * b:4 * b + 4], x[i, :, 4 * a:4 * a + 4, 4 * b:4 * b + 4])}
            expected = sorted(patches, key=lambda p: -patches[p])[:int(np.ceil(step * 64))]
            assert gone == set(expected)
    monkeypatch.undo()
    curves = d.flip_concepts(net, x, y, 0)
    assert all(np.allclose(c[:, 0], d.chances(net, x, y), atol=1e-6) for c in curves.values())


def test_the_same_images_are_picked_for_every_network():
    labels = np.random.default_rng(0).integers(0, 4, 100)
    picked = d.pick_images(labels, 9, 3)
    assert (np.bincount(labels[picked]) == 9).all() and len(set(picked)) == 36 and np.array_equal(picked, d.pick_images(labels, 9, 3))
