"""The tables: against scikit-learn, against the printed numbers, and with holes where cells are missing."""
import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from dermgan import evidence, results
from dermgan.core import CLASSES, published, resolve_run
from dermgan.grid import write_outcome
from dermgan.settings import CellKey, cell_name
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
    record = {"name": name, "n_synthetic": 0 if set_name == "baseline" else synthetic, "n_train": 84, "synthetic": [],
              "history": {"epoch": [0, 1, 2], "loss": [2.0, 1.5, 1.2], "balanced_accuracy": [0.2, 0.3 + seed / 10, 0.25]},
              "made_by": {"arch": arch, "set": set_name, "filtered": filtered, "seed": seed}}
    run.path("ckpt", "classify", f"{name}.json").write_text(json.dumps(record))
    return arrays


def tables(run):
    return results.table2(run, evidence.open_study(run))


def make_run(root, **changes):
    run = resolve_run("smoke", 0, CHANGES | changes, root=root)
    for split in ("train", "val", "holdout", "test"):
        labels = [k % 7 for k in range(84)]
        draw = np.random.default_rng(len(split))
        colours = [np.clip(draw.normal(30 * k + 20, 6, (16, 16, 3)), 0, 255).astype(np.uint8) for k in labels]
        pack_images(run.path("lmdb", split), colours, [f"{split}{k}" for k in range(84)], labels,
                    [f"{split}-l{k // 14}-{k % 7}" for k in range(84)], CLASSES, 16)
    return run


# --- the grid ---

def test_the_papers_numbers_stand_beside_their_own_networks_only(tmp_path):
    run = make_run(tmp_path)
    put_cell(run, "densenet_small", "baseline")
    put_cell(run, "densenet_small", "2k")
    accuracy, gains = tables(run)
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
    run = make_run(tmp_path, cls_seeds="2", cls_sets="baseline, 2k, 6k, 8k")
    for seed in (0, 1):
        put_cell(run, "densenet_small", "baseline", seed=seed)
    put_cell(run, "densenet_small", "2k", seed=0)
    put_cell(run, "densenet_small", "6k", seed=0)
    write_outcome(run, CellKey("densenet_small", "6k", False, 1), "NotFinite: The loss is nan at epoch 3.\nWhy.\nDo this.", True)
    accuracy, gains = tables(run)
    part = accuracy.query("architecture == 'densenet_small' and not filtered and eval == 'test'").set_index("set")
    assert part.value.notna().tolist() == [True] + [False] * 5 and gains.empty
    assert "1 of 2 seeds" in part.reason["2k"] and "not finished" in part.reason["2k"]
    assert "NotFinite: The loss is nan" in part.reason["6k"] and "\n" not in part.reason["6k"]
    assert part.reason["8k"] == "not finished" and part.reason["4k"] == "not run in this profile"
    text = results.print_table2(accuracy, gains, "test").splitlines()
    assert text[2].count("—") == 5 and sum("paper, test" in line for line in text) == 3
    assert [line.split("|")[-6:-1] for line in text if "densenet121" in line and "paper" in line][0] == [" +1.9 ", " +2.2 ", " +2.6 ", " +1.2 ", " +1.8 "]


def test_the_mean_over_seeds_is_a_mean_and_a_difference_is_paired(tmp_path):
    run = make_run(tmp_path, cls_seeds="2")
    once = np.ones((1, 84), np.float32)
    by_seed = [put_cell(run, "densenet_small", "baseline", seed=seed, draw=seed, skill=0.5) for seed in (0, 1)]
    for seed in (0, 1):
        put_cell(run, "densenet_small", "2k", seed=seed, draw=seed, skill=0.5)
        put_cell(run, "densenet_small", "6k", seed=seed, draw=seed, skill=9)
    accuracy, gains = tables(run)
    expected = np.mean([balanced_accuracy_score(a["test_labels"], a["test_probabilities"].argmax(1)) for a in by_seed])
    row = accuracy.query("architecture == 'densenet_small' and set == 'baseline' and eval == 'test'").iloc[0]
    assert row.value == pytest.approx(expected, abs=1e-6) and row.low <= row.value <= row.high and row.n == 84
    same, better = (gains.query("eval == 'test' and set == @name").iloc[0] for name in ("2k", "6k"))
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert better.value == pytest.approx(1 - expected, abs=1e-6) and better.low > 0
    assert evidence.balanced(by_seed[0]["test_probabilities"], by_seed[0]["test_labels"], once).shape == (1,)


def test_table_3_has_the_papers_rows_and_its_own_values(tmp_path):
    run = make_run(tmp_path)
    arrays = {name: put_cell(run, "densenet_small", name, draw=k) for k, name in enumerate(("baseline", "6k"))}
    frame = results.table3(run, evidence.open_study(run))
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
    assert evidence.balanced(colours.probabilities[0], colours.labels, np.ones((1, 84), np.float32))[0] > 0.9
    study = evidence.open_study(run)
    recall, confusion = results.recall_frame(run, study), results.confusion_frame(run, study)
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


# --- controls, curves, sentences ---

def test_a_control_is_compared_with_the_set_of_its_size_and_with_nothing_else(tmp_path):
    run = make_run(tmp_path, cls_sets="baseline, 2k, 6k, duplicates-2k, inverted-6k")
    arrays = {name: put_cell(run, "densenet_small", name, draw=k, skill=skill) for k, (name, skill) in enumerate(
        {"baseline": 0.4, "2k": 1.2, "6k": 0.7, "duplicates-2k": 0.5}.items())}
    frame = results.controls_table(run, evidence.open_study(run))
    assert list(frame)[:2] == ["control", "metric"] and frame.value.notna().eq(frame.reason.eq("")).all()
    found = frame.query("eval == 'test' and control == 'duplicates-2k'").set_index("metric").value
    score = {name: balanced_accuracy_score(a["test_labels"], a["test_probabilities"].argmax(1)) for name, a in arrays.items()}
    assert found["gain over the baseline"] == pytest.approx(score["duplicates-2k"] - score["baseline"], abs=1e-6)
    assert found["synthetic minus control"] == pytest.approx(score["2k"] - score["duplicates-2k"], abs=1e-6)
    missing = frame[frame.value.isna()].drop_duplicates("control").set_index("control").reason
    assert missing["inverted-6k"] == "not finished" and missing["random-6k"] == "not run in this profile"
    assert {"steps-6k", "classical-6k", "clustered-6k", "screened-6k"} <= set(missing.index)


def test_a_control_without_its_baseline_is_no_gain(tmp_path):
    run = make_run(tmp_path, cls_sets="baseline, 6k, duplicates-6k")
    put_cell(run, "densenet_small", "duplicates-6k")
    rows = results.controls_table(run, evidence.open_study(run)).query("eval == 'test' and control == 'duplicates-6k'").set_index("metric")
    assert rows.value.notna().tolist() == [True, False, False] and rows.reason["gain over the baseline"].startswith("baseline: ")


def test_table_3_is_bold_where_it_is_best_and_the_papers_bold_is_the_papers(tmp_path):
    run = make_run(tmp_path, cls_sets="baseline, 6k")
    for k, name in enumerate(("baseline", "6k")):
        put_cell(run, "densenet_small", name, draw=k)
    frame = results.table3(run, evidence.open_study(run))
    lines = [line.split("|") for line in results.print_table3(frame, "test").splitlines()]
    columns = {name.strip(): i for i, name in enumerate(lines[0])}
    ours = {line[2].strip(): line for line in lines[2:] if line[1].strip() == "ours"}
    wide = frame[frame["eval"] == "test"].pivot(index="set", columns="class", values="value")
    for label in CLASSES:
        bold = [name for name, line in ours.items() if "**" in line[columns[label]]]
        assert set(bold) == set(wide.index[wide[label] == wide[label].max()])
    theirs = {line[2].strip(): line for line in lines[2:] if line[1].strip() == "paper"}
    best = {label: max(theirs, key=lambda name: published()["auc"][name][label]) for label in (*CLASSES, "average")}
    assert all("**" in theirs[best[label]][columns[label]] for label in best) and len(theirs) == 3


@pytest.mark.parametrize("gap, words", [((0.02, 0.01, 0.03), "a gain"), ((-0.02, -0.03, -0.01), "a loss"), ((0.02, -0.01, 0.05), "not told apart from 0")])
def test_the_three_sentences_follow_the_intervals(tmp_path, gap, words):
    run = make_run(tmp_path, gan_split="train")
    gains = pd.DataFrame([("densenet_small", False, "6k", "holdout", *gap, 84)], columns=["architecture", "filtered", "set", "eval", "value", "low", "high", "n"])
    controls = pd.DataFrame([("clustered-6k", "synthetic minus control", "holdout", *gap), ("inverted-6k", "synthetic minus control", "holdout", *gap)],
                            columns=["control", "metric", "eval", "value", "low", "high"])
    said = results.verdict(run, gains, controls, evidence.Study({}, {("a", "6k", False): "no"}), 0.031)
    one, two, three = said.split(". ")
    assert one.endswith(f"(95 %: {100 * gap[1]:+.1f} to {100 * gap[2]:+.1f}; {words})") and "SA-6k" in one
    assert f"over inverted-6k {100 * gap[0]:+.1f} points" in two and "clustered" not in two
    assert "1 lines" in three and "from 3.1 points on" in three and "from scratch" in three
