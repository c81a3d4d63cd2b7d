"""PCX: mixtures, prototypes and novelty, against loops and SciPy in float64."""
import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.metrics import adjusted_rand_score, roc_auc_score

from dermgan.core import DataMissing, NotFinite
from dermgan import pcx


def clusters(seed, n=300, concepts=20, k=3, apart=9.0):
    draw = np.random.default_rng(seed)
    which = draw.integers(0, k, n)
    return which, apart * np.eye(k, concepts)[which] + draw.normal(size=(n, concepts))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_clusters_are_found_and_their_number_too(seed):
    which, vectors = clusters(seed)
    mixture, tried = pcx.choose(vectors, seed)
    assert adjusted_rand_score(which, pcx.groups(mixture, vectors)) >= 0.95
    assert tried.chosen.sum() == 1 and tried[tried.chosen].components.iloc[0] == 3
    assert tried[tried.chosen].stability.iloc[0] > 0.9


@pytest.mark.parametrize("kind", ["full", "diag"])
def test_the_density_is_that_of_whole_gaussians(kind):
    _, vectors = clusters(4)
    mixture = pcx.fit(vectors, 3, 0, (5, kind))
    basis, total = mixture.basis, np.zeros(len(vectors))
    left = np.eye(20) - basis @ basis.T
    for weight, mean, spread in zip(mixture.parts.weights_, mixture.parts.means_, mixture.parts.covariances_):
        inner = np.diag(spread) if kind == "diag" else spread
        whole = basis @ inner @ basis.T + mixture.noise * left
        total += weight * multivariate_normal(mixture.centre + basis @ mean, whole).pdf(vectors)
    assert np.allclose(np.log(total), pcx.log_density(mixture, vectors), atol=1e-8)
    outside = vectors[:5] + 40 * left[0] / np.linalg.norm(left[0])
    assert (pcx.log_density(mixture, outside) < pcx.log_density(mixture, vectors[:5]) - 50).all()


def test_full_covariance_only_where_the_class_bears_it():
    draw = np.random.default_rng(0)
    assert pcx.pick_shape(draw.normal(size=(115, 640))) == (11, "diag")
    directions, kind = pcx.pick_shape(draw.normal(size=(700, 640)))
    assert kind == "full" and directions == 700 // 40
    assert pcx.pick_shape(draw.normal(size=(9000, 64)) * np.r_[np.ones(64)])[0] <= 64
    flat = draw.normal(size=(900, 2)) @ draw.normal(size=(2, 40))
    assert pcx.pick_shape(flat)[0] <= 2
    for n in (200, 400, 4000):
        directions, kind = pcx.pick_shape(draw.normal(size=(n, 100)))
        assert kind == "full" and n / max(pcx.COMPONENTS) > 6 * directions


def test_one_cloud_is_called_one():
    vectors = np.random.default_rng(3).normal(size=(240, 15))
    tried = pcx.choose(vectors, 3)[1]
    assert tried.components[tried.criterion.argmin()] == 1 and tried.chosen.sum() == 1


def test_prototypes_and_rows_against_loops():
    _, vectors = clusters(6)
    mixture = pcx.fit(vectors, 3, 0)
    frame = pcx.prototypes(mixture, vectors)
    far = np.array([[np.sqrt(sum((v - m) ** 2)) for m in mixture.means] for v in vectors])
    for row in frame.itertuples():
        assert row.sample == far[:, row.component].argmin()
        assert row.covers == sum(far.argmin(1) == row.component)
    assert frame.covers.sum() == len(vectors) and np.isclose(frame.share.sum(), 1) and frame.covers.is_monotonic_decreasing
    means = np.array([[5.0, 0, -4, 0.1], [0.2, 3, 0, 0]])
    assert pcx.matrix_rows(means, 2) == [0, 1] and set(pcx.matrix_rows(means, 3)) == {0, 1, 2}
    nearest, apart = pcx.difference(mixture, vectors[7])
    assert nearest == far[7].argmin() and np.allclose(apart + mixture.means[nearest], vectors[7])


def test_too_few_samples_and_values_that_are_no_numbers_are_refused():
    labels = np.repeat([0, 1], [19, 40])
    told = {"vectors": np.random.default_rng(0).normal(size=(59, 8)).astype(np.float32), "logits": np.eye(2)[labels]}
    with pytest.raises(DataMissing) as error:
        pcx.study(told, labels, 0, "DF", 0)
    assert len(str(error.value).splitlines()) == 3 and "DF has 19" in str(error.value)
    done = pcx.study(told, labels, 1, "NV", 0)
    assert np.allclose(np.abs(done.vectors).sum(1), 100, atol=0.1) and (done.positions >= 19).all()
    told["logits"][40:] = [1, 0]
    assert len(pcx.correct_samples(told, labels, 1)[0]) == 21
    broken = told["vectors"][:30].astype(float)
    broken[3, 2] = np.nan
    with pytest.raises(NotFinite):
        pcx.fit(broken, 2, 0)


def test_outliers_change_what_they_say_and_nothing_else():
    images = torch.randint(0, 180, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    kept = images.clone()
    kinds = pcx.outliers(images, 5)
    assert torch.equal(images, kept) and torch.equal(255 - kinds["inverted"], images)
    cut = lambda x: sorted(x[i, :, 8 * a:8 * a + 8, 8 * b:8 * b + 8].flatten().tolist() for i in (0,) for a in range(4) for b in range(4))
    assert cut(kinds["shuffled"]) == cut(images) and not torch.equal(kinds["shuffled"], images)
    bright = torch.full((4, 3, 64, 64), 230, dtype=torch.uint8)
    drawn, mask = pcx.draw_on(bright, ("ruler",), 5)
    darker = (drawn.float() - 230).mean(1).numpy()
    assert (darker[mask] < -30).all() and np.abs(darker[~mask]).mean() < 25 and mask.any((1, 2)).all()
    assert torch.equal(pcx.draw_on(bright[2:], ("ruler",), 5, [2, 3])[0], drawn[2:])


def test_novelty_areas_against_sklearn():
    draw = np.random.default_rng(1)
    scores = {"as it was": draw.normal(size=30).round(1), "inverted": draw.normal(1, 1, 30).round(1), "other diagnosis": draw.normal(size=12)}
    areas = pcx.novelty_aucs(scores, [f"a{i // 2}" for i in range(30)], [f"b{i}" for i in range(12)], 300, 0)
    base = scores["as it was"]
    for kind, (area, low, high, n) in areas.items():
        pairs = [(b > a) + (a == b) / 2 for i, a in enumerate(base) for j, b in enumerate(scores[kind]) if n == 12 or i // 2 != j // 2]
        assert np.isclose(area, np.mean(pairs)) and low < area < high
    assert np.isclose(areas["other diagnosis"][0], roc_auc_score(np.repeat([0, 1], [30, 12]), np.r_[base, scores["other diagnosis"]]))
    assert pcx.novelty_aucs(scores | {"other diagnosis": np.empty(0)}, ["a"] * 30, [], 10, 0).keys() == {"inverted"}
