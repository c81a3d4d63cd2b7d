"""The statistics, each restated slowly: scikit-learn, pair-by-pair sums, scipy, and simulated truth."""
import json
import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from dermgan import evidence
from dermgan.core import CLASSES, resolve_run
from dermgan.evidence import Cell
from dermgan.store import pack_images


def scores(labels, seed, skill=1.0):
    "Probabilities with ties."
    draw = np.random.default_rng(seed)
    raw = (draw.random((len(labels), 7)) + skill * np.eye(7)[labels]).round(1) + 0.1
    return raw / raw.sum(1, keepdims=True)



@pytest.mark.parametrize("seed", range(5))
def test_balanced_accuracy_and_auc_are_scikit_learns(seed):
    draw = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(7), draw.integers(0, 7, 200)])
    guess, once = scores(labels, seed), np.ones((1, 207), np.float32)
    assert evidence.balanced(guess, labels, once)[0] == pytest.approx(balanced_accuracy_score(labels, guess.argmax(1)), abs=1e-7)
    mine = evidence.class_aucs(guess, labels, once)[0]
    theirs = [roc_auc_score(labels == k, guess[:, k]) for k in range(7)]
    assert np.allclose(mine, [*theirs, np.mean(theirs)], atol=1e-9)
    times = draw.integers(0, 4, (3, 207)).astype(np.float32)
    for row, weighted in zip(times, evidence.class_aucs(guess, labels, times)):
        theirs = [roc_auc_score(labels == k, guess[:, k], sample_weight=row) for k in range(7)]
        assert np.allclose(weighted[:7], theirs, atol=1e-9)
        repeated = np.repeat(np.arange(207), row.astype(int))
        slow = balanced_accuracy_score(labels[repeated], guess[repeated].argmax(1))
        assert evidence.balanced(guess, labels, row[None])[0] == pytest.approx(slow, abs=1e-6)


def test_a_class_without_images_is_no_zero():
    labels, once = np.array([0, 0, 2, 2]), np.ones((1, 4), np.float32)
    guess = np.eye(3)[[0, 1, 2, 2]]
    assert evidence.balanced(guess, labels, once)[0] == 0.75 and np.isnan(evidence.recalls(guess, labels, once)[0, 1])
    assert np.isnan(evidence.auc(guess[:, 1], labels == 1, once)[0])


def test_lesions_stay_together_and_no_class_vanishes():
    labels, lesions = np.array([0] * 30 + [1] * 2 + [2]), [f"l{k // 3}" for k in range(30)] + ["a", "b", "c"]
    weights = evidence.resample(labels, lesions, 2000, 0)
    assert (weights[:, 0:30:3] == weights[:, 1:30:3]).all() and (weights[:, 0:30:3] == weights[:, 2:30:3]).all()
    assert all((weights[:, labels == k].sum(1) > 0).all() for k in range(3))
    assert np.allclose(weights[:, :30].mean(0), 0.9, atol=0.1) and (weights[:, 32] == 1).all()
    assert np.array_equal(weights, evidence.resample(labels, lesions, 2000, 0))


def test_the_interval_holds_the_truth_in_95_of_100():
    chances, counts = np.array([.6, .9, .8, .7, .75, .65, .85]), [60, 200, 50, 40, 80, 45, 40]
    lesion_label, hits, trials = np.repeat(np.arange(7), counts), 0, 1500
    for trial in range(trials):
        draw = np.random.default_rng([11, trial])
        size = np.where(draw.random(len(lesion_label)) < 0.3, 2, 1)
        right = np.repeat(draw.random(len(size)) < chances[lesion_label], size)
        labels, lesions = np.repeat(lesion_label, size), np.repeat(np.arange(len(size)), size)
        guess = np.eye(7, dtype=np.float32)[np.where(right, labels, (labels + 1) % 7)]
        low, high = evidence.interval(evidence.balanced(guess, labels, evidence.resample(labels, lesions, 250, trial)))
        hits += low <= chances.mean() <= high
    assert abs(hits / trials - 0.95) <= 0.02


# --- differences over seeds ---

def cell(probabilities, labels, lesions=None):
    return Cell(probabilities, labels, lesions or [f"l{k}" for k in range(len(labels))], "")


def test_a_paired_difference_is_the_mean_of_each_seeds_own_difference():
    labels = np.arange(70) % 7
    one, two = ([scores(labels, 10 * side + k, skill) for k in range(3)] for side, skill in ((1, 0.9), (2, 0.4)))
    weights = evidence.with_data(evidence.resample(labels, [f"l{k // 2}" for k in range(70)], 300, 0))
    drawn, spread = evidence.paired(cell(one, labels), cell(two, labels), weights, evidence.balanced, 5)
    gaps = [balanced_accuracy_score(labels, a.argmax(1)) - balanced_accuracy_score(labels, b.argmax(1)) for a, b in zip(one, two)]
    assert drawn[0] == pytest.approx(np.mean(gaps), abs=1e-6) and spread == pytest.approx(np.std(gaps, ddof=1), abs=1e-6)
    alone, none = evidence.paired(cell(one[:1], labels), cell(two[:1], labels), weights, evidence.balanced, 5)
    slow = [evidence.balanced(one[0], labels, w[None])[0] - evidence.balanced(two[0], labels, w[None])[0] for w in weights]
    assert np.allclose(alone, slow, atol=1e-6) and np.isnan(none)


@pytest.mark.parametrize("many", [2, 3, 8])
def test_the_luck_of_a_training_is_in_the_interval_in_19_of_20(many):
    "Between-seed variance alone: the interval is Student's, and holds the truth as often as it says."
    give, hits, trials = (lambda p, labels, w: p[0, 0] + np.zeros(len(w))), 0, 500
    none = cell([np.zeros((1, 1))] * many, np.zeros(1, int))
    for trial in range(trials):
        values = np.random.default_rng([5, many, trial]).normal(1, 0.5, many)
        drawn, spread = evidence.paired(cell([np.full((1, 1), v) for v in values], np.zeros(1, int)), none, np.ones((2001, 1)), give, trial)
        low, high = evidence.interval(drawn[1:])
        hits += low <= 1 <= high
    assert spread == pytest.approx(values.std(ddof=1)) and abs(hits / trials - 0.95) <= 0.03
    expected = stats.t.interval(0.95, many - 1, loc=values.mean(), scale=stats.sem(values))
    wide, _ = evidence.paired(cell([np.full((1, 1), v) for v in values], np.zeros(1, int)), none, np.ones((200001, 1)), give, 1)
    assert np.allclose(evidence.interval(wide[1:]), expected, rtol=0.05)


def test_lesions_and_trainings_add_up():
    "Both chances at once: the variance of the draws is that of lesions plus that of trainings."
    labels, many = np.arange(350) % 7, 9
    one, two = ([scores(labels, 100 * side + k, skill) for k in range(many)] for side, skill in ((1, 0.7), (2, 0.5)))
    weights = evidence.with_data(evidence.resample(labels, [f"l{k}" for k in range(350)], 3000, 0))
    drawn, spread = evidence.paired(cell(one, labels), cell(two, labels), weights, evidence.balanced, 3)
    lesions = np.mean([evidence.balanced(a, labels, weights) - evidence.balanced(b, labels, weights) for a, b in zip(one, two)], 0)[1:].var()
    assert drawn[1:].var() == pytest.approx(lesions + spread**2 / many * (many - 1) / (many - 3), rel=0.12)


# --- calibration ---

@pytest.mark.parametrize("seed", range(3))
def test_the_calibration_error_is_that_of_the_definition(seed):
    draw = np.random.default_rng(seed)
    sure, right, weight = draw.random(200).round(2), draw.random(200) < 0.6, draw.integers(0, 3, 200)
    expected, edges = 0.0, np.linspace(0, 1, 16)
    for low, high, last in zip(edges, edges[1:], [False] * 14 + [True]):
        inside = (sure >= low) & ((sure < high) | last)
        if weight[inside].sum():
            gap = np.average(right[inside], weights=weight[inside]) - np.average(sure[inside], weights=weight[inside])
            expected += weight[inside].sum() / weight.sum() * abs(gap)
    assert evidence.ece(sure, right, weight[None].astype(np.float64))[0] == pytest.approx(expected, abs=1e-12)


def test_calibration_has_a_column_a_class_and_one_of_the_prediction():
    labels = np.arange(140) % 7
    p, once = scores(labels, 1), np.ones((1, 140))
    found = evidence.calibration(p, labels, once)[0]
    assert found.shape == (8,) and found[3] == pytest.approx(evidence.ece(p[:, 3], labels == 3, once)[0])
    assert found[7] == pytest.approx(evidence.ece(p.max(1), p.argmax(1) == labels, once)[0])
    sure = evidence.calibration(np.eye(7)[labels], labels, once)[0]
    assert np.allclose(sure, 0)


def test_the_reliability_diagram_counts_every_image_once():
    labels = np.arange(140) % 7
    frame = evidence.reliability(cell([scores(labels, k) for k in range(3)], labels))
    assert frame.n.sum() == 3 * 140 and frame.value.between(0, 1).all() and frame.confidence.is_monotonic_increasing
    hits = sum((scores(labels, k).argmax(1) == labels).sum() for k in range(3))
    assert (frame.value * frame.n).sum() == pytest.approx(hits)


# --- tests of significance ---

@pytest.mark.parametrize("b, c", [(0, 0), (1, 0), (8, 1), (5, 5), (30, 14), (0, 12), (3, 7)])
def test_mcnemar_is_scipys_binomial_test(b, c):
    one = np.array([True] * b + [False] * c + [True] * 9 + [False] * 4)
    other = np.array([False] * b + [True] * c + [True] * 9 + [False] * 4)
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert evidence.mcnemar(one, other)[:2] == (b, c) and evidence.mcnemar(one, other)[2] == pytest.approx(expected, abs=1e-12)


def slow_delong(scores, positive):
    "DeLong, DeLong and Clarke-Pearson (1988) pair by pair: areas and their covariance, float64."
    kernel = [np.array([[1.0 if x > y else 0.5 if x == y else 0.0 for y in s[~positive]] for x in s[positive]]) for s in scores]
    v10, v01 = (np.stack([k.mean(axis) for k in kernel]) for axis in (1, 0))
    return np.array([k.mean() for k in kernel]), np.cov(v10, ddof=1) / positive.sum() + np.cov(v01, ddof=1) / (~positive).sum()


@pytest.mark.parametrize("seed", range(4))
def test_delong_is_the_u_statistic_of_1988(seed):
    draw = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(7), draw.integers(0, 7, 90)])
    a, b = scores(labels, seed, 0.6), scores(labels, seed + 50, 0.3)
    for k in range(7):
        positive = labels == k
        areas, covariance = slow_delong([a[:, k], b[:, k]], positive)
        assert areas[0] == pytest.approx(roc_auc_score(positive, a[:, k]), abs=1e-12)
        error = np.sqrt(np.array([1, -1]) @ covariance @ [1, -1])
        gap, low, high, p = evidence.delong(cell([a], labels), cell([b], labels), [k]) if positive.sum() > 1 else (areas[0] - areas[1],) * 4
        if positive.sum() > 1:
            assert gap == pytest.approx(areas[0] - areas[1], abs=1e-12) and high - low == pytest.approx(2 * 1.96 * error, abs=1e-10)
            assert p == pytest.approx(2 * stats.norm.sf(abs(gap) / error), abs=1e-10)
            area, terms = evidence.area_terms(a[:, k], positive)
            assert (terms**2).sum() == pytest.approx(covariance[0, 0], abs=1e-12)


def test_delong_of_lesions_is_delong_of_images_where_each_has_one_and_wider_where_copies_stand():
    labels = np.arange(140) % 7
    a, b = scores(labels, 3, 0.6), scores(labels, 4, 0.4)
    plain = evidence.delong(cell([a], labels), cell([b], labels), list(range(7)))
    double = lambda x: np.concatenate([x, x])
    names = [f"l{k % 140}" for k in range(280)]
    clustered = evidence.delong(cell([double(a)], double(labels), names), cell([double(b)], double(labels), names), list(range(7)))
    naive = evidence.delong(cell([double(a)], double(labels)), cell([double(b)], double(labels)), list(range(7)))
    width = lambda found: found[2] - found[1]
    assert clustered[0] == pytest.approx(plain[0], abs=1e-12)
    assert width(clustered) == pytest.approx(width(plain), rel=0.05) and width(naive) == pytest.approx(width(plain) / 2**0.5, rel=0.05)


def test_delong_of_one_model_with_itself_is_no_difference():
    labels = np.arange(70) % 7
    same = cell([scores(labels, 1), scores(labels, 2)], labels)
    assert evidence.delong(same, same, [0, 1])[:1] == (0.0,) and evidence.delong(same, same, [0, 1])[3] == 1.0


@pytest.mark.parametrize("p, expected", [([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]), ([0.5, 0.9], [1.0, 1.0]), ([0.02], [0.02]),
                                         ([0.01, np.nan, 0.01], [0.02, np.nan, 0.02]), ([], []), ([0.04, 0.01, 0.2, 0.012], [0.08, 0.04, 0.2, 0.04])])
def test_holm_by_hand(p, expected):
    assert np.allclose(evidence.holm(np.array(p, float)), expected, equal_nan=True)


def test_holm_keeps_the_family_wise_error():
    draw, wrong = np.random.default_rng(0), 0
    for _ in range(2000):
        wrong += evidence.holm(draw.random(8)).min() < 0.05
    assert abs(wrong / 2000 - 0.05) < 0.015


def test_mcnemar_takes_one_photograph_a_lesion():
    labels, lesions = np.arange(60) % 3, [f"l{k % 20}" for k in range(60)]
    good, bad = np.eye(3)[labels], np.eye(3)[(labels + 1) % 3]
    row = evidence.compare(cell([good], labels, lesions), cell([bad], labels, lesions), ("A", "B", "C"))[0]
    assert row[0] == "McNemar" and row[5] == 20 and row[6:8] == (20, 0) and row[2] == 1.0
    assert row[8] == pytest.approx(2 * 0.5**20)


# --- groups ---

def test_skin_tones_are_those_of_the_scale():
    edges = {-90: "dark", -30.01: "dark", -29.9: "brown", 10: "tan", 27.9: "tan", 28: "intermediate", 41.2: "light", 55: "very light", 89: "very light"}
    assert evidence.skin_tone(np.array(list(edges))).tolist() == list(edges.values())


def test_small_groups_join_and_each_group_is_judged_on_its_own():
    labels = np.arange(140) % 7
    right = np.where(np.arange(140) < 70, labels, (labels + 1) % 7)
    groups = pd.DataFrame({"site": ["back"] * 70 + ["face"] * 65 + ["toe"] * 3 + ["ear"] * 2})
    rows = pd.DataFrame(evidence.subgroup_rows(cell([np.eye(7)[right]], labels), groups, 40, 0),
                        columns=["attribute", "group", "metric", "value", "low", "high", "n", "classes"])
    whole = rows[rows.metric == "balanced accuracy"].set_index("group")
    assert whole.n.to_dict() == {"back": 70, "face": 65, "other": 5} and whole.value.tolist() == [1, 0, 0]
    assert rows[(rows.metric == "MEL recall") & (rows.group == "back")].n.tolist() == [10] and whole.classes["other"] == 5


# --- the study ---

def make_run(root, **changes):
    run = resolve_run("smoke", 0, {"image_px": "16", "bootstrap_n": "100", "cls_sets": "baseline, 2k", "cls_seeds": "2"} | changes, root=root)
    picture = np.full((16, 16, 3), 128, np.uint8)
    pack_images(run.path("lmdb", "val"), [picture] * 14, [f"v{k}" for k in range(14)], [k % 7 for k in range(14)], [f"v{k}" for k in range(14)], CLASSES, 16)
    return run


def put(run, set_name, seed, skill=0.5, splits=("val", "holdout")):
    from dermgan.settings import cell_name
    name, arrays, labels = cell_name("densenet_small", set_name, False, seed), {}, np.arange(84) % 7
    for split in splits:
        arrays |= {f"{split}_probabilities": scores(labels, seed + 7 * len(set_name), skill), f"{split}_labels": labels,
                   f"{split}_ids": np.array([f"i{k}" for k in range(84)]), f"{split}_lesion_ids": np.array([f"l{k // 14}-{k % 7}" for k in range(84)])}
    np.savez(run.path("ckpt", "classify", f"{name}.npz"), **arrays)
    run.path("ckpt", "classify", f"{name}.json").write_text(json.dumps({"name": name, "history": {}}))


def test_a_line_of_which_a_seed_is_missing_is_a_hole_and_never_a_mean_over_the_rest(tmp_path):
    run = make_run(tmp_path)
    for seed in (0, 1):
        put(run, "baseline", seed)
    put(run, "2k", 0)
    study = evidence.open_study(run)
    assert list(study.cells) == [("densenet_small", "baseline", False)] and len(study.cells["densenet_small", "baseline", False]) == 2
    assert study.reasons["densenet_small", "2k", False].startswith("1 of 2 seeds finished")
    assert study.reasons["densenet169", "6k", True] == "not run in this profile"
    assert evidence.side(study, ("densenet_small", "baseline", False), "test").reason == "this run has no test set"
    for seed in (0, 1):
        put(run, "2k", seed, skill=9)
    frames = evidence.evidence(run, evidence.open_study(run), ("holdout",))
    assert set(frames["evidence"].set) == {"baseline", "2k"} and set(frames["differences"].set) == {"2k"}
    assert frames["differences"].query("metric == 'balanced accuracy'").low.item() > 0
    assert frames["tests"]["p (Holm)"].ge(frames["tests"].p).all() and frames["tests"].query("test == 'McNemar'").n.item() == 42
    assert len(frames["evidence"]) == 2 * (1 + 7 + 8 + 8)


def test_the_pictures_hold_their_data():
    labels = np.arange(140) % 7
    points = pd.concat([evidence.reliability(cell([scores(labels, k)], labels)).assign(set=f"s{k}", eval="test", error=0.1) for k in range(2)])
    assert len(evidence.draw_reliability(points).axes[0].collections) == 2
    rows = [(s, "test", a, g, "balanced accuracy", 0.5, 0.4, 0.6, 30) for s, (a, g) in itertools.product(("baseline", "6k"), (("sex", "f"), ("sex", "m"), ("age", "old")))]
    frame = pd.DataFrame(rows, columns=["set", "eval", "attribute", "group", "metric", "value", "low", "high", "n"])
    assert [t.get_text() for t in evidence.draw_subgroups(frame, "test").axes[0].get_yticklabels()] == ["sex: f (30)", "sex: m (30)", "age: old (30)"]
