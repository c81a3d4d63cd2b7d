"""The classifier: its networks, its order of images, its stop, its resume."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from dermgan import allot, classify, grid
from dermgan.core import (CLASSES, ConfigError, DataMissing, DataRefused, NotFinite, RunMismatch, file_sha256, load_state,
                          resolve_run, rng, save_weights)
from dermgan.stages import failed_cells, forget_incomplete, run_cell
from dermgan.settings import CellKey, cell_key, cell_name, parse_set, plan_cells, read_profile
from dermgan.data import open_images
from dermgan.store import pack_images, to_float

CHANGES = {"image_px": "32", "cls_batch": "16", "cls_epochs": "2", "cls_patience": "2", "precision": "fp32", "cls_lr": "1e-3"}


def pictures(labels, seed):
    "Noise whose brightness tells the class."
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 100 + 20 * k, (32, 32, 3), dtype=np.uint8) for k in labels]


def make_run(root, **changes):
    "A run with small stores: 70 training images, 14 of each other split, 70 synthetic ones."
    run = resolve_run("smoke", 0, CHANGES | changes, root=root)
    for split, n in (("train", 70), ("val", 14), ("holdout", 14), ("test", 14)):
        labels = [k % 7 for k in range(n)]
        pack_images(run.path("lmdb", split), pictures(labels, n), [f"{split}{k}" for k in range(n)], labels,
                    [f"{split}-l{k // 2}" for k in range(n)], CLASSES, 32)
    train = open_images(run, "train")
    frame = pd.DataFrame({"image_id": [f"train{k}-SV+" for k in range(70)], "source_id": train.ids, "lesion_id": train.lesion_ids,
                          "label": train.labels, "transformation": "SV", "kept": [k % 10 > 0 for k in range(70)]})
    kept = frame[frame.kept]
    pack_images(run.path("lmdb", "synthetic"), pictures(kept.label, 5), kept.image_id.tolist(), kept.label.tolist(),
                kept.lesion_id.tolist(), CLASSES, 32)
    frame.to_csv(run.path("tables", "synthetic.csv"), index=False)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("classify"))


# --- networks ---

@pytest.mark.parametrize("arch,parameters", [("densenet121", 7_978_856), ("densenet169", 14_149_480)])
def test_the_printed_networks_are_torchvisions(arch, parameters):
    net = classify.build(arch, 1000)
    assert sum(p.numel() for p in net.parameters()) == parameters
    theirs = getattr(classify.import_torchvision().models, arch)(weights=None)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert net.features.denseblock1.denselayer1.drop_rate == 0.1


def test_initial_weights_are_a_pure_function_of_the_seed():
    torch.manual_seed(5)
    a = classify.build("densenet_small", 3, seed=1)
    state = torch.get_rng_state()
    b, c = (classify.build("densenet_small", 3, seed=k) for k in (1, 2))
    assert torch.equal(a.classifier.weight, b.classifier.weight) and not torch.equal(a.classifier.weight, c.classifier.weight)
    assert torch.equal(state, torch.get_rng_state())


def test_imagenet_weights_are_read_under_torchvisions_old_names(tmp_path):
    source = classify.build("densenet121", 1000, seed=9)
    old = {k.replace("norm1.", "norm.1.").replace("norm2.", "norm.2.").replace("conv1.", "conv.1.").replace("conv2.", "conv.2."): v
           for k, v in source.state_dict().items() if "num_batches" not in k}
    assert any(".norm.1." in k for k in old)
    save_weights(tmp_path / "densenet121.safetensors", old)
    net = classify.build("densenet121", 7, pretrained="imagenet", weights=tmp_path)
    assert torch.equal(net.features.conv0.weight, source.features.conv0.weight)
    assert torch.equal(net.features.denseblock4.denselayer16.norm2.weight, source.features.denseblock4.denselayer16.norm2.weight)
    assert net.classifier.out_features == 7


def test_absent_foreign_and_damaged_imagenet_weights_are_refused(tmp_path):
    with pytest.raises(DataMissing) as absent:
        classify.build("densenet169", pretrained="imagenet", weights=tmp_path)
    assert len(str(absent.value).splitlines()) == 3 and "densenet169-b2777c0a.pth" in str(absent.value)
    save_weights(tmp_path / "densenet169.safetensors", classify.build("densenet121", 1000).state_dict())
    with pytest.raises(DataRefused, match="another architecture"):
        classify.build("densenet169", pretrained="imagenet", weights=tmp_path)
    torch.save(classify.build("densenet121", 1000).state_dict(), tmp_path / "densenet121-a639ec97.pth")
    with pytest.raises(DataRefused, match="damaged"):
        classify.build("densenet121", pretrained="imagenet", weights=tmp_path)
    with pytest.raises(ConfigError, match="densenet_small"):
        classify.build("resnet50")


# --- order, augmentation, stop ---

def test_the_oversampled_shares_are_equal_over_20000_draws():
    labels = torch.tensor(np.random.default_rng(0).choice(7, 2000, p=[.11, .67, .05, .03, .11, .015, .015]))
    drawn = torch.cat([labels[allot.oversample(labels, 3, epoch)] for epoch in range(10)])
    assert len(drawn) == 20_000 and (torch.bincount(drawn) / 20_000 - 1 / 7).abs().max() <= 0.02


def test_the_order_depends_on_seed_and_epoch_only_and_no_batch_has_one_image():
    labels = torch.arange(33) % 3
    first = allot.batches(labels, 16, 1, 0)
    torch.manual_seed(0)
    torch.rand(10)
    assert first == allot.batches(labels, 16, 1, 0) != allot.batches(labels, 16, 1, 1) != allot.batches(labels, 16, 2, 1)
    assert [len(b) for b in first] == [16, 17]


def test_a_class_that_is_absent_does_no_harm():
    assert set(allot.oversample(torch.tensor([0, 0, 2]), 0, 0).tolist()) <= {0, 1, 2}


def test_augmentation_is_a_flip_and_one_hidden_rectangle():
    x = torch.randint(1, 256, (200, 3, 24, 24), generator=rng(0), dtype=torch.uint8)
    seen, plain, kinds = allot.augment(x, 0.25, rng(1)), to_float(x), set()
    for image, original in zip(seen, plain):
        variants = {(a, b): original.flip([d for d, on in ((1, b), (2, a)) if on]) for a in (0, 1) for b in (0, 1)}
        matches = {k: (image == v).float().mean().item() for k, v in variants.items()}
        kind = max(matches, key=matches.get)
        kinds.add(kind)
        hidden = (image != variants[kind]).any(0)
        rows, columns = hidden.any(1).nonzero().flatten(), hidden.any(0).nonzero().flatten()
        assert hidden.sum() == len(rows) * len(columns) and len(rows) <= 6 and len(columns) <= 6
        assert (image[:, hidden] == 0).all()
    assert kinds == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_early_stopping_counts_exactly_the_patience():
    draw = np.random.default_rng(0)
    for _ in range(200):
        curve, patience = draw.integers(0, 6, 30).tolist(), int(draw.integers(1, 6))
        best, since, stop = -1, 0, None
        for epoch, score in enumerate(curve):
            best, since = (score, 0) if score > best else (best, since + 1)
            if since == patience:
                stop = epoch + 1
                break
        mine = next((n for n in range(len(curve) + 1) if classify.should_stop(curve[:n], patience)), None)
        assert mine == stop


def test_training_stops_after_exactly_patience_epochs(tmp_path, monkeypatch):
    run = make_run(tmp_path, cls_epochs="9", cls_patience="3")
    given = iter([0.2, 0.5, 0.5, 0.4, 0.5, 0.9, 0.9, 0.9, 0.9])
    monkeypatch.setattr(classify, "balanced_accuracy", lambda *_: next(given, 0.0))
    monkeypatch.setattr(classify, "train_step", lambda *_: 1.0)
    record = classify.train_cell(run, "densenet_small")
    assert len(record["history"]["loss"]) == 5 and record["best_epoch"] == 1 and record["stopped_early"]


# --- a cell ---

def test_a_cell_is_written_whole_and_not_trained_twice(run, monkeypatch):
    record = classify.train_cell(run, "densenet_small")
    folder = run.folder / "ckpt" / "classify"
    assert sorted(p.name for p in folder.glob("densenet_small-baseline-plain-s0*")) == [
        f"densenet_small-baseline-plain-s0.{end}" for end in ("json", "npz", "safetensors", "safetensors.sha256")]
    arrays = np.load(folder / "densenet_small-baseline-plain-s0.npz")
    for split in ("val", "holdout", "test"):
        images = open_images(run, split)
        assert arrays[f"{split}_probabilities"].shape == (14, 7) and arrays[f"{split}_ids"].tolist() == images.ids
        assert np.allclose(arrays[f"{split}_probabilities"].sum(1), 1, atol=1e-5)
        model = classify.load_cell(run, "densenet_small-baseline-plain-s0")
        assert np.allclose(classify.predict(model, images), arrays[f"{split}_probabilities"], atol=1e-5)
    monkeypatch.setattr(classify, "end_epoch", lambda *_: pytest.fail("trained again"))
    assert classify.train_cell(run, "densenet_small") == record


def test_a_finished_cell_of_other_settings_is_refused(run):
    classify.train_cell(run, "densenet_small")
    changed = dataclasses.replace(run, profile=dataclasses.replace(run.profile, cls_cutout=0.5))
    with pytest.raises(RunMismatch, match="cls_cutout") as refusal:
        classify.train_cell(changed, "densenet_small")
    assert "cls_lr" not in str(refusal.value)


def test_a_set_adds_its_drawn_images_and_filtering_keeps_a_subset_of_them(run):
    wanted = set(allot.draw_set(run, "10k", 70))
    pool = classify.cell_pool(run, CellKey("densenet_small", "10k", False, 0))
    assert set(pool.added) == wanted and len(pool.added) == allot.set_size(run, "10k", 70) == 14
    assert len(pool.images) == len(pool.labels) == pool.draws == 84
    assert [pool.images[i][1] for i in range(84)] == pool.labels.tolist()
    store, stored = open_images(run, "synthetic"), pool.images[83][0]
    assert torch.equal(stored, store.batch([store.ids.index(pool.added[-1])])[0])
    record = classify.train_cell(run, "densenet_small", "10k", True)
    model = classify.load_cell(run, "densenet_small-10k-plain-s0")
    right = classify.predict(model, store).argmax(1) == store.labels
    kept = {name for name, ok in zip(store.ids, right) if ok and name in wanted}
    assert set(record["synthetic"]) == kept and record["drawn"] == 14 and record["n_synthetic"] == len(kept)
    with pytest.raises(ConfigError, match="baseline"):
        classify.cell_pool(run, CellKey("densenet_small", "baseline", True, 0))


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    run, real = make_run(tmp_path), torch.nn.functional.cross_entropy
    calls = []

    def poisoned(*words):
        calls.append(1)
        return real(*words) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(classify.F, "cross_entropy", poisoned)
    with pytest.raises(NotFinite, match="epoch 0, step 3") as stop:
        classify.train_cell(run, "densenet_small", save_s=0)
    assert len(str(stop.value).splitlines()) == 3
    state = load_state(run.folder / "ckpt" / "classify" / "densenet_small-baseline-plain-s0.pt")
    assert state["step"] == 3 and all(torch.isfinite(v).all() for v in state["model"].values())


CHILD = """
import functools, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from dermgan import classify
from dermgan.core import read_run

def dying(name, number):
    real, calls = getattr(classify, name), []
    @functools.wraps(real)
    def call(*words):
        answer = real(*words)
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
    setattr(classify, name, call)

if __name__ == "__main__":
    if sys.argv[2] != "never":
        dying(sys.argv[2], int(sys.argv[3]))
    if sys.argv[4] == "resumed":
        classify.pick_precision = lambda *_: sys.exit("measured again")
    classify.train_cell(read_run(Path(sys.argv[1])), "densenet_small", "10k", save_s=0, workers=int(sys.argv[5]))
"""


def finished(run):
    folder = run.folder / "ckpt" / "classify"
    record = json.loads((folder / "densenet_small-10k-plain-s0.json").read_text())
    arrays = np.load(folder / "densenet_small-10k-plain-s0.npz")
    record.pop("step_seconds")
    return (file_sha256(folder / "densenet_small-10k-plain-s0.safetensors"), record, {k: arrays[k].tobytes() for k in arrays.files})


def child(folder, run, moment, mode, workers):
    (folder / "child.py").write_text(CHILD)
    words = [sys.executable, str(folder / "child.py"), str(run.folder), moment[0], str(moment[1]), mode, str(workers)]
    return subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    run = make_run(folder, precision="bf16")
    done = child(folder, run, ("never", 0), "fresh", 0)
    assert done.returncode == 0, done.stderr[-600:]
    return finished(run)


MOMENTS = [("train_step", 1),    # before the first checkpoint
           ("train_step", 3),    # between a step and its checkpoint
           ("save_fit", 2),      # in the middle of an epoch
           ("end_epoch", 1),     # after a validation that no checkpoint holds
           ("save_weights", 1),  # between the weights and the probabilities
           ("write_atomic", 1)]  # between the probabilities and the record


@pytest.mark.parametrize("workers,kills", [(0, MOMENTS), (2, [("save_fit", 4)])], ids=["six times", "with two readers"])
def test_killed_at_any_moment_it_resumes_bit_for_bit(tmp_path, straight, workers, kills):
    run = make_run(tmp_path, precision="bf16")
    for k, moment in enumerate(kills):
        killed = child(tmp_path, run, moment, "resumed" if k > 1 else "fresh", workers)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-600:]
        assert classify.read_cell(run, "densenet_small-10k-plain-s0") is None
    last = child(tmp_path, run, ("never", 0), "resumed", workers)
    assert last.returncode == 0, last.stderr[-600:]
    assert finished(run) == straight


SHARED = """
import os, signal, sys
from dermgan import classify, reproduce

real, calls = classify.train_step, []

def dying(*words):
    "Kill the second process at its seventh step, the first time it gets there."
    calls.append(1)
    if len(calls) == 7 and sys.argv[1] == "dies" and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*words)

classify.code_key = lambda *_: "same"
classify.train_step = dying
sys.exit(reproduce.main(["train", *sys.argv[2:]]))
"""


def shared(folder, run, word, cell, restarts=0):
    "A cell by the real command, in two processes."
    (folder / "shared.py").write_text(SHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts),
               str(folder / "shared.py"), word, "classifier", str(run.folder), f"densenet_small-{cell}"]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_a_cell_in_two_processes_loses_one_and_ends_as_if_it_had_not(tmp_path):
    ends = []
    for word, restarts in (("lives", 0), ("dies", 1)):
        run = make_run(tmp_path / word, precision="bf16")
        done = shared(tmp_path, run, word, "10k-plain-s0", restarts)
        assert done.returncode == 0, done.stderr[-1500:]
        assert ("exitcode: -9" in done.stderr) == (word == "dies")
        ends.append(finished(run))
    assert ends[0] == ends[1]


def test_processes_agree_on_precision_and_on_what_filtering_drops(tmp_path):
    run = make_run(tmp_path, precision="auto")
    done = shared(tmp_path, run, "lives", "2k-filter-s0")
    assert done.returncode == 0, done.stderr[-1500:]
    cells = [classify.read_cell(run, f"densenet_small-2k-{kind}-s0") for kind in ("plain", "filter")]
    assert cells[0]["precision"] == cells[1]["precision"] and cells[1]["n_synthetic"] <= cells[0]["n_synthetic"]
    odd = make_run(tmp_path / "odd", cls_batch="15")
    refused = shared(tmp_path, odd, "lives", "baseline-plain-s0")
    assert refused.returncode == 1 and "15 images cannot be shared by 2 processes" in refused.stderr


def test_a_checkpoint_of_other_settings_is_refused_by_the_name_of_the_key(run, tmp_path):
    key = CellKey("densenet_small", "baseline", False, 0)
    current = classify.made_by(run, key, classify.cell_pool(run, key))
    fit = classify.begin(run, "densenet_small", 7, 0, "fp32")
    path = classify.save_fit(tmp_path / "cell.pt", fit, {"made_by": current | {"cls_lr": 0.5}, "step_seconds": {}})
    with pytest.raises(RunMismatch, match="cls_lr: 0.5 then, 0.001 now"):
        classify.resume(run, path, current, 7, 0)


def test_the_precision_is_what_the_profile_says_or_the_faster_of_two(run, monkeypatch):
    assert classify.pick_precision(run, "densenet_small", 7) == ("fp32", {})
    auto = dataclasses.replace(run, profile=dataclasses.replace(run.profile, precision="auto"))
    ticks = iter(np.cumsum([0, 5] * 5 + [0, 1] * 5).tolist())
    monkeypatch.setattr(classify, "time", SimpleNamespace(process_time=lambda: next(ticks), monotonic=lambda: 0, perf_counter=None))
    assert classify.pick_precision(auto, "densenet_small", 7) == ("bf16", {"fp32": 5, "bf16": 1})


# --- the grid ---

def test_the_names_of_sets_are_read_in_one_place():
    assert [parse_set(name).kind for name in ("baseline", "2k", "10k-filter", "steps-6k", "clustered-4k")] == [
        "baseline", "drawn", "drawn", "steps", "clustered"]
    for word in ("3k", "baseline-filter", "steps-6k-filter", "wild-6k", "steps-baseline", "6k-steps", "", "-6k"):
        with pytest.raises(ConfigError, match="unknown") as refusal:
            parse_set(word)
        assert len(str(refusal.value).splitlines()) == 3
    with pytest.raises(ConfigError, match="wild-6k"):
        read_profile("smoke", {"cls_sets": "baseline, wild-6k"})


def test_the_paper_profile_plans_the_papers_grid_and_five_controls():
    keys = plan_cells(read_profile("paper"))
    lines = [(a, f) for a, f in (("densenet121", False), ("densenet169", False), ("densenet169", True))]
    printed = {(a, s, f, 0) for a, f in lines for s in ("baseline", "2k", "4k", "6k", "8k", "10k") if not (f and s == "baseline")}
    controls = {("densenet169", f"{kind}-6k", False, 0) for kind in ("steps", "duplicates", "classical", "inverted", "random")}
    assert set(keys) == printed | controls and len(keys) == 22 and keys[0].set == keys[1].set == "baseline"
    assert all(cell_key(cell_name(*key)) == key for key in keys)
    seeds = plan_cells(read_profile("paper", {"cls_seeds": "3"}))
    assert len(seeds) == 66 and {key.seed for key in seeds} == {0, 1, 2}


def test_a_cell_that_fails_leaves_its_reason_and_the_rest_is_trained(tmp_path, monkeypatch):
    run = make_run(tmp_path, cls_sets="baseline, 2k, 2k-filter, 10k", cls_epochs="1")
    real, keys = torch.nn.functional.cross_entropy, plan_cells(run.profile)
    monkeypatch.setattr(grid, "train_cell", lambda run, *key: classify.train_cell(run, *key) if key[1] != "2k" else poisoned(run, *key))

    def poisoned(run, *key):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(classify.F, "cross_entropy", lambda *words: real(*words) * float("nan"))
            return classify.train_cell(run, *key)

    reasons = {(key.set, key.filtered): grid.attempt(run, key) for key in keys}
    assert reasons["baseline", False] == reasons["10k", False] == ""
    assert reasons["2k", False].startswith("NotFinite: The loss is nan") and "unfiltered cell failed" in reasons["2k", True]
    done = grid.open_cells(run)
    assert [cell.set for cell in done] == ["baseline", "10k"]
    missing = dict(grid.holes(run))
    assert missing[CellKey("densenet_small", "2k", False, 0)] == reasons["2k", False]
    assert missing[CellKey("densenet169", "6k", True, None)] == missing[CellKey("densenet_small", "8k", False, None)] == "not run in this profile"
    assert missing[CellKey("densenet_small", "steps-6k", False, None)] == "not run in this profile"
    assert not any(key.set in ("baseline", "10k") and key.arch == "densenet_small" and not key.filtered for key in missing)
    notes = failed_cells(run)
    assert len(notes) == 2 and all(note["again"] for note in notes.values())
    assert set(forget_incomplete(run)) == set(notes) and failed_cells(run) == {}
    assert dict(grid.holes(run))[keys[1]] == "not finished"


def test_a_finished_cell_opens_with_all_that_the_statistics_need(run):
    classify.train_cell(run, "densenet_small")
    cell = grid.open_cells(run)[0]
    assert cell[:5] == ("densenet_small-baseline-plain-s0", "densenet_small", "baseline", False, 0)
    for split in ("val", "holdout", "test"):
        images = open_images(run, split)
        assert cell.ids[split] == images.ids and cell.lesions[split] == images.lesion_ids
        assert cell.labels[split].tolist() == images.labels.tolist() and cell.probabilities[split].shape == (14, 7)
    assert len(cell.history["loss"]) == len(cell.history["balanced_accuracy"]) and cell.record["draws"] == 70


def test_a_result_of_other_settings_is_a_hole_and_not_read(tmp_path):
    run = make_run(tmp_path, cls_sets="baseline", cls_epochs="1")
    key = plan_cells(run.profile)[0]
    assert grid.attempt(run, key) == "" and len(grid.open_cells(run)) == 1
    changed = dataclasses.replace(run, profile=dataclasses.replace(run.profile, cls_cutout=0.5))
    assert grid.attempt(changed, key).startswith("RunMismatch") and grid.open_cells(changed) == []


@pytest.mark.parametrize("labels,word", [([7] * 3, "none of the 7 classes"), ([-1], "none of the 7 classes")])
def test_a_label_that_is_no_class_is_refused(tmp_path, labels, word):
    run = make_run(tmp_path)
    given = [*labels, *(k % 7 for k in range(70 - len(labels)))]
    pack_images(run.path("lmdb", "train"), pictures([0] * 70, 1), [f"train{k}" for k in range(70)], given,
                [f"train-l{k // 2}" for k in range(70)], CLASSES, 32)
    with pytest.raises(DataRefused, match=word) as refusal:
        classify.train_cell(run, "densenet_small")
    assert len(str(refusal.value).splitlines()) == 3
    assert grid.attempt(run, CellKey("densenet_small", "baseline", False, 0)).startswith("DataRefused")
    assert not any(note["again"] for note in failed_cells(run).values())


def test_a_class_with_fewer_images_than_parts_is_refused_by_name(tmp_path):
    run = make_run(tmp_path)
    labels = [k % 6 for k in range(14)]
    pack_images(run.path("lmdb", "val"), pictures(labels, 2), [f"val{k}" for k in range(14)], labels,
                [f"val-l{k}" for k in range(14)], CLASSES, 32)
    with pytest.raises(DataRefused, match="VASC has 10 training and 0 validation images") as refusal:
        classify.train_cell(run, "densenet_small")
    assert len(str(refusal.value).splitlines()) == 3 and "at least three" in str(refusal.value)


def test_a_filtered_set_of_which_nothing_is_left_is_a_hole(tmp_path, monkeypatch):
    run = make_run(tmp_path, cls_sets="baseline, 2k, 2k-filter", cls_epochs="1")
    monkeypatch.setattr(classify, "misclassified", lambda run, key: set(allot.draw_set(run, key.set, 70)))
    assert grid.attempt(run, CellKey("densenet_small", "2k", False, 0)) == ""
    reason = grid.attempt(run, CellKey("densenet_small", "2k", True, 0))
    assert reason.startswith("DataRefused: SA-2k has no synthetic image.\nAll drawn images are dropped.")


def test_the_order_of_cells_changes_nothing(tmp_path):
    results = []
    for k, order in enumerate((1, -1)):
        run = make_run(tmp_path / str(k), cls_sets="baseline, 2k, 2k-filter, duplicates-10k", cls_epochs="1")
        assert all(grid.attempt(run, key) == "" for key in plan_cells(run.profile)[::order])
        results.append({cell.name: (cell.record["synthetic"], cell.probabilities["test"].tobytes()) for cell in grid.open_cells(run)})
    assert len(results[0]) == 4 and results[0] == results[1]


def test_all_cells_of_an_architecture_share_one_precision(tmp_path, monkeypatch):
    run, measured = make_run(tmp_path, precision="auto", cls_epochs="1"), []
    monkeypatch.setattr(classify, "pick_precision", lambda *_: measured.append(1) or ("bf16" if len(measured) == 1 else "fp32", {"bf16": 1}))
    records = [classify.train_cell(run, "densenet_small", name) for name in ("baseline", "2k")]
    assert [record["precision"] for record in records] == ["bf16", "bf16"] and len(measured) == 1


def test_a_killed_or_failing_process_leaves_a_hole_and_a_good_status(tmp_path):
    run = make_run(tmp_path, cls_epochs="90", cls_patience="90")
    name, seen = "densenet_small-baseline-plain-s0", []
    worker = threading.Thread(target=lambda: seen.append(run_cell(name, run.folder)))
    worker.start()
    checkpoint = run.folder / "ckpt" / "classify" / f"{name}.pt"
    while worker.is_alive() and not checkpoint.exists():
        time.sleep(0.2)
    family = [p for p in psutil.Process().children(recursive=True) if "train" in p.cmdline()]
    family[0].kill()
    worker.join()
    assert seen == [0] and failed_cells(run)[name]["again"] and "signal 9" in failed_cells(run)[name]["reason"]
    assert dict(grid.holes(run))[cell_key(name)].startswith("Its process ended with signal 9")
    (run.folder / "lmdb" / "train" / "complete").unlink()
    assert run_cell(name, run.folder) == 0
    assert failed_cells(run)[name]["reason"].startswith("DataNotReady: The image store train is not complete")


# --- the command ---

def test_the_command_says_what_is_allowed(run, tmp_path, capsys):
    from dermgan.reproduce import main
    train = lambda *words: main(["train", "classifier", *map(str, words)])
    for wrong, word in [("densenet_small-baseline-filter-s0", "SIZE-filter"), ("densenet_small-6k-wild-plain-s0", "baseline"),
                        ("resnet50-baseline-plain-s0", "densenet169"), ("6k", "densenet169-6k-filter-s0")]:
        assert train(run.folder, wrong) == 2 and word in (said := capsys.readouterr().err) and len(said.strip().splitlines()) == 3
    assert train(tmp_path, "densenet_small-baseline-plain-s0") == 2 and train(run.folder) == 2 and main(["train"]) == 2
    assert "dermgan train classifier" in capsys.readouterr().err
    assert train(run.folder, "densenet_small-baseline-plain-s0") == 0
    assert "test" in capsys.readouterr().out


def test_balanced_accuracy_is_scikit_learns():
    from sklearn.metrics import balanced_accuracy_score
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        labels, guess = (torch.randint(0, 4, (60,), generator=draw) for _ in range(2))
        assert abs(classify.balanced_accuracy(labels, guess) - balanced_accuracy_score(labels, guess)) < 1e-12
