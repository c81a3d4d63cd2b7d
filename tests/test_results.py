"""The tables' arithmetic: against scikit-learn, against simulated truth, and against the printed numbers."""
import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from dermgan import results
from dermgan.classify import cell_name
from dermgan.core import CLASSES, published, resolve_run
from dermgan.store import pack_images

CHANGES = {"image_px": "16", "bootstrap_n": "200", "cls_sets": "baseline, 2k, 6k"}


def scores(labels, seed, skill=1.0):
    "Probabilities with ties."
    draw = np.random.default_rng(seed)
    raw = (draw.random((len(labels), 7)) + skill * np.eye(7)[labels]).round(1) + 0.1
    return raw / raw.sum(1, keepdims=True)


def put_cell(run, arch, set_name, filtered=False, seed=0, skill=1.0, synthetic=40, draw=None):
    "A finished cell without a training."
    name, arrays = cell_name(arch, set_name, filtered, seed), {}
    for split in ("val", "holdout", "test"):
        labels = np.arange(84) % 7
        arrays |= {f"{split}_probabilities": scores(labels, draw if draw is not None else len(set_name) + seed, skill),
                   f"{split}_labels": labels, f"{split}_ids": np.array([f"{split}{k}" for k in range(84)]),
                   f"{split}_lesion_ids": np.array([f"{split}-l{k // 14}-{k % 7}" for k in range(84)])}
    np.savez(run.path("ckpt", "classify", f"{name}.npz"), **arrays)
    record = {"name": name, "n_synthetic": 0 if set_name == "baseline" else synthetic,
              "made_by": {"arch": arch, "set": set_name, "filtered": filtered, "seed": seed}}
    run.path("ckpt", "classify", f"{name}.json").write_text(json.dumps(record))
    return arrays


def make_run(root, **changes):
    run = resolve_run("smoke", 0, CHANGES | changes, root=root)
    for split in ("train", "val", "holdout", "test"):
        labels = [k % 7 for k in range(84)]
        draw = np.random.default_rng(len(split))
        colours = [np.clip(draw.normal(30 * k + 20, 6, (16, 16, 3)), 0, 255).astype(np.uint8) for k in labels]
        pack_images(run.path("lmdb", split), colours, [f"{split}{k}" for k in range(84)], labels,
                    [f"{split}-l{k // 14}-{k % 7}" for k in range(84)], CLASSES, 16)
    return run


# --- arithmetic ---

@pytest.mark.parametrize("seed", range(5))
def test_balanced_accuracy_and_auc_are_scikit_learns(seed):
    draw = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(7), draw.integers(0, 7, 200)])
    guess, once = scores(labels, seed), np.ones((1, 207), np.float32)
    assert results.balanced(guess, labels, once)[0] == pytest.approx(balanced_accuracy_score(labels, guess.argmax(1)), abs=1e-7)
    mine = results.class_aucs(guess, labels, once)[0]
    theirs = [roc_auc_score(labels == k, guess[:, k]) for k in range(7)]
    assert np.allclose(mine, [*theirs, np.mean(theirs)], atol=1e-9)
    times = draw.integers(0, 4, (3, 207)).astype(np.float32)
    for row, weighted in zip(times, results.class_aucs(guess, labels, times)):
        theirs = [roc_auc_score(labels == k, guess[:, k], sample_weight=row) for k in range(7)]
        assert np.allclose(weighted[:7], theirs, atol=1e-9)
        repeated = np.repeat(np.arange(207), row.astype(int))
        slow = balanced_accuracy_score(labels[repeated], guess[repeated].argmax(1))
        assert results.balanced(guess, labels, row[None])[0] == pytest.approx(slow, abs=1e-6)


def test_a_class_without_images_is_no_zero():
    labels, once = np.array([0, 0, 2, 2]), np.ones((1, 4), np.float32)
    guess = np.eye(3)[[0, 1, 2, 2]]
    assert results.balanced(guess, labels, once)[0] == 0.75 and np.isnan(results.recalls(guess, labels, once)[0, 1])
    assert np.isnan(results.auc(guess[:, 1], labels == 1, once)[0])


def test_lesions_stay_together_and_no_class_vanishes():
    labels, lesions = np.array([0] * 30 + [1] * 2 + [2]), [f"l{k // 3}" for k in range(30)] + ["a", "b", "c"]
    weights = results.resample(labels, lesions, 2000, 0)
    assert (weights[:, 0:30:3] == weights[:, 1:30:3]).all() and (weights[:, 0:30:3] == weights[:, 2:30:3]).all()
    assert all((weights[:, labels == k].sum(1) > 0).all() for k in range(3))
    assert np.allclose(weights[:, :30].mean(0), 0.9, atol=0.1) and (weights[:, 32] == 1).all()
    assert np.array_equal(weights, results.resample(labels, lesions, 2000, 0))


def test_the_interval_holds_the_truth_in_95_of_100():
    chances, counts = np.array([.6, .9, .8, .7, .75, .65, .85]), [60, 200, 50, 40, 80, 45, 40]
    lesion_label, hits, trials = np.repeat(np.arange(7), counts), 0, 1500
    for trial in range(trials):
        draw = np.random.default_rng([11, trial])
        size = np.where(draw.random(len(lesion_label)) < 0.3, 2, 1)
        right = np.repeat(draw.random(len(size)) < chances[lesion_label], size)
        labels, lesions = np.repeat(lesion_label, size), np.repeat(np.arange(len(size)), size)
        guess = np.eye(7, dtype=np.float32)[np.where(right, labels, (labels + 1) % 7)]
        low, high = results.interval(results.balanced(guess, labels, results.resample(labels, lesions, 250, trial)))
        hits += low <= chances.mean() <= high
    assert abs(hits / trials - 0.95) <= 0.02


# --- the grid ---

def test_the_papers_numbers_stand_beside_their_own_networks_only(tmp_path):
    run = make_run(tmp_path)
    put_cell(run, "densenet_small", "baseline")
    put_cell(run, "densenet_small", "2k")
    accuracy, gains = results.table2(run)
    assert list(accuracy)[:3] == ["architecture", "filtered", "set"]
    assert {"value", "low", "high", "n", "paper"} <= set(accuracy) and not accuracy.duplicated(["architecture", "filtered", "set", "eval"]).any()
    for row in published()["balanced_accuracy"]:
        part = accuracy.query("architecture == @row['architecture'] and filtered == @row['filtered'] and eval == 'test'").set_index("set")
        for name in ("2k", "4k", "6k", "8k", "10k"):
            assert part.paper[name] == pytest.approx(row["baseline"] + row[name])
        assert part.paper["baseline"] == row["baseline"] and part.value.isna().all() and (part.reason != "").all()
    small = accuracy[accuracy.architecture == "densenet_small"]
    assert small.paper.isna().all() and set(small["eval"]) == {"holdout", "test"}
    assert accuracy[accuracy.architecture == "chance"].value.tolist() == [pytest.approx(1 / 7)] * 2
    assert gains.set.tolist() == ["2k", "2k"]


def test_a_cell_that_was_not_run_is_a_hole_with_its_reason(tmp_path):
    run = make_run(tmp_path, cls_seeds="2")
    for seed in (0, 1):
        put_cell(run, "densenet_small", "baseline", seed=seed)
    put_cell(run, "densenet_small", "2k", seed=0)
    for seed in (0, 1):
        put_cell(run, "densenet_small", "6k", seed=seed, synthetic=0)
    accuracy = results.table2(run)[0].query("architecture == 'densenet_small' and eval == 'test'").set_index("set")
    assert accuracy.value.notna().tolist() == [True] + [False] * 5
    assert "1 of 2 seeds" in accuracy.reason["2k"] and "no synthetic image" in accuracy.reason["6k"]
    assert "cls_sets" in accuracy.reason["4k"]


def test_the_mean_over_seeds_is_a_mean_and_a_difference_is_paired(tmp_path):
    run = make_run(tmp_path, cls_seeds="2")
    once = np.ones((1, 84), np.float32)
    by_seed = [put_cell(run, "densenet_small", "baseline", seed=seed, draw=seed, skill=0.5) for seed in (0, 1)]
    for seed in (0, 1):
        put_cell(run, "densenet_small", "2k", seed=seed, draw=seed, skill=0.5)
        put_cell(run, "densenet_small", "6k", seed=seed, draw=seed, skill=9)
    accuracy, gains = results.table2(run)
    expected = np.mean([balanced_accuracy_score(a["test_labels"], a["test_probabilities"].argmax(1)) for a in by_seed])
    row = accuracy.query("architecture == 'densenet_small' and set == 'baseline' and eval == 'test'").iloc[0]
    assert row.value == pytest.approx(expected, abs=1e-6) and row.low <= row.value <= row.high and row.n == 84
    same, better = (gains.query("eval == 'test' and set == @name").iloc[0] for name in ("2k", "6k"))
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert better.value == pytest.approx(1 - expected, abs=1e-6) and better.low > 0
    assert results.balanced(by_seed[0]["test_probabilities"], by_seed[0]["test_labels"], once).shape == (1,)


def test_table_3_has_the_papers_rows_and_its_own_values(tmp_path):
    run = make_run(tmp_path)
    arrays = {name: put_cell(run, "densenet_small", name, draw=k) for k, name in enumerate(("baseline", "6k"))}
    frame = results.table3(run)
    assert list(frame)[:2] == ["set", "class"]
    test = frame[frame["eval"] == "test"].set_index(["set", "class"])
    for title, printed in published()["auc"].items():
        assert {k: test.paper[title, k] for k in printed} == printed
    a = arrays["6k"]
    expected = [roc_auc_score(a["test_labels"] == k, a["test_probabilities"][:, k]) for k in range(7)]
    assert np.allclose([test.value["SA-6k", k] for k in CLASSES], expected) and np.isclose(test.value["SA-6k", "average"], np.mean(expected))
    assert test.value["SA-6k-filter"].isna().all() and (test.reason["SA-6k-filter"] != "").all()
    assert test.n["SA-6k", "MEL"] == 12 and test.n["SA-6k", "average"] == 84


def test_the_colour_baseline_sees_colours_and_the_figures_hold_their_data(tmp_path):
    run = make_run(tmp_path)
    put_cell(run, "densenet_small", "baseline", skill=9)
    put_cell(run, "densenet_small", "6k", skill=0.5, draw=3)
    colours = results.colour_baseline(run)["test"]
    assert results.balanced(colours.probabilities[0], colours.labels, np.ones((1, 84), np.float32))[0] > 0.9
    recall, confusion = results.recall_frame(run), results.confusion_frame(run)
    assert recall.query("set == 'baseline'").value.eq(1).all() and set(recall.set) == {"baseline", "SA-6k"}
    sums = confusion.groupby(["set", "eval", "true"])[["count", "share"]].sum()
    assert sums["count"].eq(12).all() and np.allclose(sums.share, 1) and set(confusion.set) == {"baseline", "SA-6k"}
    bars, matrix = results.draw_recall(recall), results.draw_confusion(confusion)
    assert len(bars.axes) == 2 and len(matrix.axes) == 5
    again = pd.read_csv(pd.io.common.StringIO(recall.to_csv(index=False)))
    heights = [p.get_height() for p in results.draw_recall(again).axes[0].patches]
    assert np.allclose(heights, [p.get_height() for p in bars.axes[0].patches])


def test_each_row_of_figure_5_states_its_own_number_of_images():
    rows = [("baseline", c, split, 0.5, 0.4, 0.6, n) for split, n in (("holdout", 23), ("test", 7)) for c in ("MEL", "NV")]
    frame = pd.DataFrame(rows, columns=["set", "class", "eval", "value", "low", "high", "n"])
    labels = [[t.get_text() for t in ax.get_xticklabels()] for ax in results.draw_recall(frame).axes]
    assert labels == [["MEL\nn = 23", "NV\nn = 23"], ["MEL\nn = 7", "NV\nn = 7"]]
