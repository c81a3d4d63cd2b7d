"""The phantom: same seed same bytes, cut as you like; and what is called true can be measured in the pixels."""
import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from dermgan import core, lesion, phantom
from dermgan.core import CLASSES, DataNotReady
from dermgan.data import open_images


@pytest.fixture(scope="module")
def drawn():
    return phantom.sample(240, 64, seed=3, images_per_lesion=1, artefacts={})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp("phantom")
    made = core.resolve_run("smoke", 5, {"phantom_lesions": "120"}, root=home)
    return made, phantom.pack_phantom(made)


def same(a, b):
    return (np.array_equal(a.images, b.images) and np.array_equal(a.masks, b.masks) and np.array_equal(a.labels, b.labels)
            and list(a.lesion_ids) == list(b.lesion_ids) and all(np.array_equal(a.factors[k], b.factors[k]) for k in a.factors)
            and all(np.array_equal(a.artefacts[k], b.artefacts[k]) for k in a.artefacts))


def part(whole, which):
    take = lambda named: {k: v[which] for k, v in named.items()}
    return phantom.Phantom(whole.images[which], whole.masks[which], whole.labels[which], take(whole.factors),
                           whole.lesion_ids[which], take(whole.artefacts))


# ---------------------------------------------------------------- randomness

def splitmix(state):
    "SplitMix64's finaliser in Python's own integers."
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ state >> shift) * factor % 2**64
    return state ^ state >> 31


def test_hash_is_splitmix_over_a_counter():
    words = lesion.hashed(9, "name", np.array([0, 5, 2**20]), 4)
    key = core.named_seed(9, "phantom", "name")
    for row, number in zip(words, (0, 5, 2**20)):
        for j, word in enumerate(row):
            assert int(word) == splitmix((key + 0x9E3779B97F4A7C15 * ((number << 32) + j)) % 2**64)


def test_draws_are_uniform_normal_and_named():
    ids = np.arange(40000)
    u, z = lesion.uniform(1, "u", ids), lesion.normal(1, "z", ids)
    assert 0 < u.min() and u.max() < 1
    assert np.abs(np.histogram(u, 20, (0, 1))[0] / 2000 - 1).max() < 0.1
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02 and abs((z**3).mean()) < 0.06
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(u, lesion.uniform(1, "v", ids))[0, 1]) < 0.02
    assert abs(np.corrcoef(u, lesion.uniform(2, "u", ids))[0, 1]) < 0.02


@pytest.mark.parametrize("image_px", [32, 64])
def test_same_seed_same_bytes_however_cut(image_px):
    whole = phantom.sample(50, image_px, seed=4)
    assert same(whole, phantom.sample(50, image_px, seed=4))
    assert same(part(whole, slice(0, 7)), phantom.sample(7, image_px, seed=4))
    order = np.array([49, 3, 3, 20])
    assert same(part(whole, order), phantom.sample(4, image_px, seed=4, indices=order))
    for i in (0, 13, 31, 33):
        assert same(part(whole, slice(i, i + 1)), phantom.sample(1, image_px, seed=4, indices=[i]))
    assert not np.array_equal(whole.images, phantom.sample(50, image_px, seed=5).images)


def test_bytes_do_not_depend_on_the_global_generators():
    np.random.seed(0)
    first = phantom.sample(3, 32, seed=1)
    np.random.seed(1)
    np.random.rand(7)
    assert same(first, phantom.sample(3, 32, seed=1))


# ---------------------------------------------------------------- primitives against slow formulas

def test_waves_equal_the_sum_of_cosines():
    draw = np.random.default_rng(0)
    k, phase, px = draw.normal(0, 6, (2, 5, 2)), draw.uniform(0, 1, (2, 5)), 24
    at = (np.arange(px) + 0.5) / px
    slow = np.zeros((2, px, px))
    for n in range(2):
        for (kx, ky), p in zip(k[n], phase[n]):
            damp = np.sinc(kx / px) * np.sinc(ky / px)
            slow[n] += np.sqrt(2 / 5) * damp * np.cos(2 * np.pi * (kx * at[None] + ky * at[:, None] + p))
    assert np.abs(lesion.waves(k.astype(np.float32), phase.astype(np.float32), px) - slow).max() < 1e-4


def test_stamps_equal_the_sum_of_spots():
    draw = np.random.default_rng(1)
    points, sigma, weight, px = draw.uniform(0, 1, (1, 4, 2)), draw.uniform(0.02, 0.1, (1, 4)), draw.uniform(0, 1, (1, 4)), 20
    at, slow = (np.arange(px) + 0.5) / px, np.zeros((px, px))
    for (x, y), s, w in zip(points[0], sigma[0], weight[0]):
        wide = np.hypot(s, 0.4 / px)
        slow += w * (s / wide) ** 2 * np.exp(-((at[None] - x) ** 2 + (at[:, None] - y) ** 2) / (2 * wide**2))
    assert np.abs(lesion.stamps(points, sigma, weight, px)[0] - slow).max() < 1e-5


@pytest.mark.parametrize("image_px", [64, 256])
def test_a_curve_covers_its_own_pixels_only(image_px):
    control = np.array([[[[0.1, 0.5], [0.5, 0.5], [0.9, 0.5]], [[0.5, 0.1], [0.5, 0.2], [0.5, 0.3]]]], np.float32)
    field = lesion.curves(control, np.full((1, 2), 0.02, np.float32), np.array([[1.0, 0.0]], np.float32), image_px)[0]
    at = (np.arange(image_px) + 0.5) / image_px
    on = np.abs(at - 0.5) < 0.01
    assert field[on][:, np.abs(at - 0.5) < 0.3].min() > 0.9
    assert field[np.abs(at - 0.5) > 0.1].max() < 0.01


def test_lab_matches_known_colours():
    lab = lesion.srgb_to_lab(np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]], float))
    known = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [53.39, 0, 0]]
    assert np.abs(lab - known).max() < 0.05


def test_colour_follows_absorption():
    skin, m, b, d = np.array([[0.8, 0.6, 0.65]], np.float32), 0.7, 0.3, 0.2
    full = lambda value: np.full((1, 2, 2), value, np.float32)
    rgb = lesion.shade(skin, (full(m), full(b), full(d)), full(0), np.zeros(1, np.float32))[:, 0, 0, 0]
    expected = skin[0] * np.exp(-(m * lesion.MELANIN + (b - 0.1) * lesion.BLOOD + d * lesion.DEEP))
    assert np.abs(rgb - expected).max() < 1e-5


# ---------------------------------------------------------------- truth

def test_types_and_shapes(drawn):
    assert drawn.images.dtype == np.uint8 and drawn.images.shape == (240, 3, 64, 64)
    assert drawn.masks.dtype == bool and drawn.masks.shape == (240, 64, 64)
    assert drawn.labels.dtype == np.int64 and set(drawn.labels) <= set(range(7))
    assert set(drawn.artefacts) == set(phantom.PRESENCE) and all(v.shape == (240, 64, 64) for v in drawn.artefacts.values())
    assert all(v.dtype == np.float32 and v.shape == (240,) and np.isfinite(v).all() for v in drawn.factors.values())
    assert all(set(names) <= set(drawn.factors) for names in phantom.PAPER_FACTORS.values())
    assert drawn.images.std((2, 3)).min() > 1


def test_masks_agree_with_factors(drawn):
    f = drawn.factors
    centre = np.array([np.argwhere(mask).mean(0)[::-1] / 64 for mask in drawn.masks])
    assert spearmanr(f["size"], drawn.masks.mean((1, 2)))[0] > 0.97
    assert spearmanr(f["x"], centre[:, 0])[0] > 0.93 and spearmanr(f["y"], centre[:, 1])[0] > 0.93
    assert np.allclose(f["area"], drawn.masks.mean((1, 2)), atol=1e-6)
    small = f["area"] < 0.3
    assert np.abs(np.sqrt(f["area"][small] / np.pi) / f["size"][small] - 1).mean() < 0.12


def test_skin_truth_is_the_skin_in_the_pixels(drawn):
    far = np.ones((64, 64), bool)
    far[8:-8, 8:-8] = False
    measured = []
    for image, mask in zip(drawn.images, drawn.masks):
        ring = far & ~mask
        measured.append(np.median(image[:, ring], 1) / 255 if ring.sum() > 60 else [np.nan] * 3)
    measured = np.array(measured)
    seen = ~np.isnan(measured[:, 0])
    lab = lesion.srgb_to_lab(measured[seen])
    for k, name in enumerate(("skin_L", "skin_a", "skin_b")):
        assert spearmanr(lab[:, k], drawn.factors[name][seen])[0] > 0.95


def test_pigment_darkens_and_background_reddens():
    hold = dict(indices=[5] * 6, labels=1, artefacts={})
    lighter = phantom.sample(6, 64, fixed={"pigment": np.linspace(0.2, 1.4, 6)}, **hold)
    inside = lighter.masks[0]
    assert (np.diff(lighter.images[:, :, inside].mean((1, 2))) < 0).all()
    assert all(np.array_equal(mask, inside) for mask in lighter.masks)
    redder = phantom.sample(6, 64, fixed={"background": np.linspace(-2, 2, 6)}, **hold)
    assert (np.diff(redder.factors["skin_a"]) > 0).all() and (np.diff(redder.factors["skin_L"]) < 0).all()
    assert all(np.array_equal(mask, redder.masks[0]) for mask in redder.masks)


def test_one_factor_moves_alone():
    hold = dict(indices=[12] * 5, labels=0, artefacts={})
    sizes = phantom.sample(5, 64, fixed={"size": np.linspace(0.12, 0.4, 5), "x": 0.5, "y": 0.5}, **hold)
    assert (np.diff(sizes.masks.sum((1, 2))) > 0).all()
    moved = phantom.sample(5, 64, fixed={"x": np.linspace(0.3, 0.7, 5), "size": 0.15}, **hold)
    centres = np.array([np.argwhere(mask).mean(0) / 64 for mask in moved.masks])
    assert np.abs(np.diff(centres[:, 1]) - 0.1).max() < 0.02 and np.ptp(centres[:, 0]) < 0.02


def test_angle_and_elongation_shape_the_mask():
    # A smooth outline: then the mask is an ellipse, and its moments give both factors back.
    angles = np.array([0.0, 30.0, 60.0, 90.0, 120.0])
    fixed = {"angle": angles, "elongation": 1.9, "irregular": 0, "size": 0.2, "x": 0.5, "y": 0.5}
    drawn = phantom.sample(5, 128, labels=1, images_per_lesion=1, artefacts={}, fixed=fixed)
    for mask, angle in zip(drawn.masks, angles):
        values, vectors = np.linalg.eigh(np.cov(np.argwhere(mask)[:, ::-1].T))
        measured = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])) % 180
        assert min(abs(measured - angle), 180 - abs(measured - angle)) < 2
        assert abs(np.sqrt(values[1] / values[0]) - 1.9) < 0.05


def test_resolution_changes_detail_not_content():
    small, large = (phantom.sample(8, px, seed=2, artefacts={}, fixed={"noise": 0}) for px in (64, 256))
    pooled = large.images.reshape(8, 3, 64, 4, 64, 4).mean((3, 5))
    assert np.abs(pooled - small.images).mean((1, 2, 3)).max() < 4
    assert np.abs(large.factors["area"] - small.factors["area"]).max() < 0.01


def test_unknown_factor_is_named():
    with pytest.raises(ValueError, match="sise.*size"):
        phantom.sample(1, 32, fixed={"sise": 0.2})


# ---------------------------------------------------------------- classes, lesions, artefacts

@pytest.mark.parametrize("seed", range(4))
def test_class_shares_are_the_priors(seed):
    labels = phantom.lesion_labels(seed, np.arange(300))
    assert np.abs(np.bincount(labels, minlength=7) - 300 * np.asarray(phantom.PRIOR)).max() <= 3
    ham = (0.082, 0.723, 0.044, 0.031, 0.097, 0.010, 0.013)
    labels = phantom.sample(400, 8, seed, images_per_lesion=1, prior=ham).labels
    assert np.abs(np.bincount(labels, minlength=7) / 400 - np.asarray(ham) / sum(ham)).max() < 0.01


def test_views_of_a_lesion_share_what_is_its_own(drawn):
    data = phantom.sample(268, 32, seed=6, artefacts={})
    frame = pd.DataFrame(data.factors).assign(lesion=data.lesion_ids, label=data.labels)
    groups = frame.groupby("lesion")
    assert abs(len(frame) / groups.ngroups - 1.34) < 0.01 and set(groups.size()) == {1, 2}
    assert (groups.label.nunique() == 1).all()
    for own in ("pigment", "background", "network", "elongation", "irregular"):
        assert (groups[own].nunique() == 1).all()
    pairs = frame[groups.label.transform("size") == 2].groupby("lesion")
    for view in ("x", "y", "light", "zoom"):
        assert (pairs[view].nunique() == 2).all()
    two = np.array([rows.index.to_numpy() for _, rows in pairs])
    alike = np.linalg.norm(data.factors["skin_L"][two[:, 0]] - data.factors["skin_L"][two[:, 1]])
    other = np.linalg.norm(data.factors["skin_L"][two[:, 0]] - np.roll(data.factors["skin_L"][two[:, 1]], 1))
    assert alike < other


def test_artefacts_come_as_often_as_asked():
    number = np.arange(4000)
    present = phantom.artefact_present(0, number, number % 7)
    for name, share in phantom.PRESENCE.items():
        assert abs(present[name].mean() - share) < 4 * np.sqrt(share * (1 - share) / 4000)
    assert not any(v.any() for v in phantom.artefact_present(0, number, number % 7, share={}).values())


@pytest.mark.parametrize("name", list(phantom.PRESENCE))
@pytest.mark.parametrize("image_px", [32, 64])
def test_an_artefact_is_where_its_mask_says(name, image_px):
    off, on = (phantom.sample(6, image_px, seed=8, artefacts={}, fixed={name: present, "noise": 0}) for present in (0, 1))
    changed = np.abs(on.images.astype(int) - off.images).max(1)
    assert on.artefacts[name].any((1, 2)).all() and not off.artefacts[name].any()
    assert changed[on.artefacts[name]].mean() > 2 * changed[~on.artefacts[name]].mean()
    assert not (changed[~on.artefacts[name]] > 90).any()
    assert np.array_equal(on.masks, off.masks) and not any(on.artefacts[k].any() for k in on.artefacts if k != name)


def test_a_planted_distractor_follows_its_class():
    number = np.arange(7000)
    labels = number % 7
    present = phantom.artefact_present(0, number, labels, plant={"ink": ("VASC", 0.9), "ruler": ("MEL", 0.0)})
    ink, ruler = present["ink"], present["ruler"]
    assert abs(ink[labels == 6].mean() - 0.9) < 0.04 and abs(ink[labels != 6].mean() - phantom.PRESENCE["ink"]) < 0.01
    assert ruler[labels == 0].sum() == 0 and ruler[labels != 0].mean() > 0.02
    plain = phantom.artefact_present(0, number, labels)
    assert all(np.array_equal(present[k], plain[k]) for k in ("hair", "bubbles", "corner"))


# ---------------------------------------------------------------- learnable, not trivial

def test_colour_alone_is_weak_but_not_blind():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    train, test = (phantom.sample(700, 32, seed, images_per_lesion=1, prior=(1,) * 7) for seed in (0, 1))
    histogram = lambda x: np.stack([np.concatenate([np.histogram(c, 16, (0, 256))[0] for c in image]) for image in x]) / 1024
    scale = StandardScaler().fit(histogram(train.images))
    model = LogisticRegression(C=0.1, max_iter=300).fit(scale.transform(histogram(train.images)), train.labels)
    right = model.predict(scale.transform(histogram(test.images))) == test.labels
    accuracy = np.mean([right[test.labels == k].mean() for k in range(7)])
    assert 0.22 < accuracy < 0.52


# ---------------------------------------------------------------- packing

def test_packed_splits_hold_whole_lesions_of_every_class(run):
    run, counts = run
    plan = phantom.phantom_plan(run)
    assert plan.groupby("lesion_id").split.nunique().max() == 1 and plan.image_id.is_unique
    lesions = plan[plan.split != "test"].drop_duplicates("lesion_id").split.value_counts(normalize=True)
    assert abs(lesions["train"] - 0.7) < 0.05 and abs(lesions["holdout"] - 0.2) < 0.04 and abs(lesions["val"] - 0.1) < 0.04
    assert (plan.groupby("split").label.nunique() == len(CLASSES)).all()
    assert counts == plan.split.value_counts(sort=False).to_dict()
    assert set(plan[plan.split == "test"].seed).isdisjoint(plan[plan.split != "test"].seed)


@pytest.mark.parametrize("split", ["train", "val", "holdout", "test"])
def test_truth_lies_beside_its_images_in_their_order(run, split):
    run, counts = run
    images, truth = open_images(run, split), phantom.open_truth(run, split)
    assert list(truth.ids) == list(images.ids) and len(images) == counts[split]
    assert np.array_equal(truth.labels, np.asarray(images.labels)) and tuple(images.classes) == CLASSES
    rows = phantom.phantom_plan(run).set_index("image_id").loc[images.ids]
    again = phantom.sample(len(rows), run.profile.image_px, int(rows.seed.iloc[0]), indices=rows["index"].to_numpy())
    assert np.array_equal(again.images, np.asarray(images.all())) and np.array_equal(again.masks, truth.masks)
    assert all(np.array_equal(again.factors[k], truth.factors[k]) for k in again.factors)
    assert all(np.array_equal(again.artefacts[k], truth.artefacts[k]) for k in again.artefacts)
    assert list(again.lesion_ids) == list(images.lesion_ids)


def test_packing_again_draws_nothing_and_a_lost_truth_is_redrawn(run, monkeypatch):
    run, counts = run
    path = run.folder / "lmdb" / "val" / "truth.npz"
    before = phantom.open_truth(run, "val")
    path.unlink()
    assert phantom.pack_phantom(run) == counts
    after = phantom.open_truth(run, "val")
    assert np.array_equal(before.masks, after.masks) and np.array_equal(before.factors["size"], after.factors["size"])

    def refuse(*_):
        pytest.fail("drew again what was complete")
        yield

    monkeypatch.setattr(phantom, "drawn_pictures", refuse)
    assert phantom.pack_phantom(run) == counts


def test_an_interrupted_packing_ends_as_an_uninterrupted_one(run, tmp_path, monkeypatch):
    whole, counts = run
    again, draw = core.resolve_run("smoke", 5, {"phantom_lesions": "120"}, root=tmp_path), phantom.drawn_pictures

    def stops(*words):
        for i, picture in enumerate(draw(*words)):
            if i == 60:
                raise KeyboardInterrupt
            yield picture

    monkeypatch.setattr(phantom, "drawn_pictures", stops)
    with pytest.raises(KeyboardInterrupt):
        phantom.pack_phantom(again)
    with pytest.raises(DataNotReady):
        open_images(again, "train")
    monkeypatch.setattr(phantom, "drawn_pictures", draw)
    assert phantom.pack_phantom(again) == counts
    for split in counts:
        a, b = open_images(whole, split), open_images(again, split)
        assert np.array_equal(a.all(), b.all()) and a.ids == b.ids
        assert np.array_equal(phantom.open_truth(whole, split).masks, phantom.open_truth(again, split).masks)


def test_missing_truth_says_what_to_run(tmp_path):
    run = core.resolve_run("smoke", 6, root=tmp_path)
    with pytest.raises(DataNotReady, match="reproduce.sh"):
        phantom.open_truth(run, "train")
