"""Synthetic images: where they come from, which are kept, which are drawn."""
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from dermgan import allot, augment, controls
from dermgan.core import CLASSES, ConfigError, DataMissing, DataRefused, SETS, published, resolve_run, rng
from dermgan.data import open_images
from dermgan.factorize import NAMES, Transformation, load_transformations, move, render, save_transformations
from dermgan.hypernet import HyperNet, render_tuned
from dermgan.hyperstyle import Inversion, Nets, pick
from dermgan.metrics import open_lpips
from dermgan.store import Images, pack_images, store_facts, to_float, to_uint8
from dermgan.stylegan2 import Generator


def small_generator():
    torch.manual_seed(3)
    g = Generator(32, z_dim=8, w_dim=8, channel_base=128, channel_max=8, mapping_layers=2)
    return g.eval().requires_grad_(False)


def inversion_of(ws, method="e4e", codes=None):
    "Codes as an inversion by some method; nobody asks how near they are."
    unknown = torch.full([len(ws)], float("nan"))
    return Inversion(method, ws, ws[:, 0, :0] if codes is None else codes, unknown, unknown, 0.0, {"generator": "small"})


def make_run(root, inverted=12):
    "A run with 40 training images, an inverted dozen, and three of the five names."
    run, g = resolve_run("smoke", 0, {"bootstrap_n": "100"}, root=root), small_generator()
    codes = torch.randn(40, g.num_ws, 8, generator=rng(0, "codes"))
    pictures = to_uint8(render(g, codes)).permute(0, 2, 3, 1).numpy()
    for split in ("train", "val", "holdout", "test"):
        pack_images(run.path("lmdb", split), list(pictures), [f"{split}{k}" for k in range(40)], [k % 7 for k in range(40)],
                    [f"{split}-l{k // 2}" for k in range(40)], CLASSES, 32)
    axes = torch.eye(8, dtype=torch.float64)
    named = dict.fromkeys(NAMES) | {name: Transformation(name, axes[k], list(range(k, k + 3)), 0.5 + k, k)
                                    for k, name in enumerate(("SPV", "BCV", "PS"))}
    save_transformations(run.path("ckpt", "transformations.json"), named)
    return run, Nets(g), pd.DataFrame({"source_id": [f"train{k}" for k in range(inverted)]}), inversion_of(codes[:inverted])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run, nets, sources, inverted = make_run(tmp_path_factory.mktemp("augment"))
    frame, words = augment.augment_sources(run, nets, sources, inverted)
    return SimpleNamespace(run=run, nets=nets, g=nets.g, sources=sources, inverted=inverted, ws=inverted.ws, frame=frame, words=words)


# --- what is made ---

def test_every_image_knows_where_it_comes_from(made):
    frame, train = made.frame, open_images(made.run, "train")
    assert len(frame) == 12 * 3 * 2 and frame.image_id.is_unique and set(frame.transformation) == {"SPV", "BCV", "PS"}
    assert {"image_id", "source_id", "lesion_id", "label", "transformation", "direction", "alpha", "lpips", "kept"} <= set(frame)
    at = [train.ids.index(name) for name in frame.source_id]
    assert frame.lesion_id.tolist() == [train.lesion_ids[i] for i in at] and frame.label.tolist() == train.labels[at].tolist()
    steps = {"SPV": 0.5, "BCV": 1.5, "PS": 2.5}
    assert np.allclose(frame.alpha.abs(), frame.transformation.map(steps)) and frame.groupby("source_id").alpha.sum().abs().max() < 1e-9


def test_the_store_holds_the_kept_images_as_the_plan_says(made):
    store, kept = Images(made.run.folder / "lmdb" / "synthetic"), made.frame[made.frame.kept]
    assert store.ids == kept.image_id.tolist() and store.lesion_ids == kept.lesion_id.tolist() and store.labels.tolist() == kept.label.tolist()
    named = load_transformations(made.run.folder / "ckpt" / "transformations.json")
    for i in (0, 7, len(store) - 1):
        row = kept.iloc[i]
        t, w = named[row.transformation], made.ws[[made.sources.source_id.tolist().index(row.source_id)]]
        slow = w.clone()
        for layer in t.layers:
            slow[0, layer] += row.alpha * t.direction.float()
        expected = to_uint8(render(made.g, slow))[0]
        apart = (store.batch([i])[0].int() - expected.int()).abs()
        assert store_facts(made.run.folder / "lmdb" / "synthetic")["store"] == "jpeg" and apart.float().mean() < 4 and apart.max() < 60


def test_the_distances_are_lpips_to_the_photograph_and_to_its_inversion(made):
    lpips, train = open_lpips(None), open_images(made.run, "train")
    named = load_transformations(made.run.folder / "ckpt" / "transformations.json")
    for row in made.frame.iloc[[0, 31, 70]].itertuples():
        place, t = made.sources.source_id.tolist().index(row.source_id), named[row.transformation]
        moved = to_float(to_uint8(render(made.g, move(made.ws[[place]], t.direction, row.alpha, t.layers))))
        photograph = to_float(train.batch([train.ids.index(row.source_id)]))
        inverted = to_float(to_uint8(render(made.g, made.ws[[place]])))
        assert row.lpips == pytest.approx(float(lpips(photograph, moved)), rel=1e-3, abs=1e-6)
        assert row.lpips_last3 == pytest.approx(float(lpips(photograph, moved, "last3")), rel=1e-3, abs=1e-6)
        assert row.lpips_inversion == pytest.approx(float(lpips(inverted, moved, "last3")), rel=1e-3, abs=1e-6)


def test_the_gate_is_the_papers_or_a_quantile_by_name(made):
    limit = np.quantile(made.frame.lpips_last3, 0.95)
    assert made.frame.kept.tolist() == (made.frame.lpips_last3 <= limit).tolist() and "LPIPS-random" in made.words
    assert augment.gate(made.frame.lpips_last3, "LPIPS", made.run)[0] == published()["lpips_max"] == 0.2


def test_it_is_made_once_and_again_where_a_step_changed(made, monkeypatch):
    monkeypatch.setattr(augment, "measure_plan", lambda *_: pytest.fail("measured again"))
    again, words = augment.augment_sources(made.run, made.nets, made.sources, made.inverted)
    assert again.image_id.tolist() == made.frame.image_id.tolist() and words == made.words
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        augment.augment_sources(made.run, made.nets, made.sources, made.inverted._replace(ws=made.ws + 1))
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        augment.augment_sources(made.run, made.nets, made.sources, made.inverted._replace(made_for={"generator": "another"}))


def test_images_are_drawn_by_the_network_that_inverted_them(made):
    torch.manual_seed(0)
    hyper = HyperNet(32, 128, 8, width=4, units=(1, 1, 1, 1), code=6)
    for value in hyper.parameters():
        value.data.add_(0.1 * torch.randn(value.shape, generator=rng(1, *value.shape)))
    hyper.eval().requires_grad_(False)
    codes = torch.randn(12, len(hyper.layers), 7, generator=rng(0, "bend"))
    bent, nets = inversion_of(made.ws, "hyperstyle", codes), made.nets._replace(hyper=hyper)
    named = load_transformations(made.run.folder / "ckpt" / "transformations.json")
    plan = augment.plan_images(made.sources.assign(lesion_id="l", label=0), named, True, 0)
    drawn = augment.render_rows(nets, plan, bent, named)
    for i in (0, 31, 70):
        row, place = plan.iloc[i], [int(plan.source[i])]
        moved = move(made.ws[place], named[row.transformation].direction, row.alpha, named[row.transformation].layers)
        assert torch.allclose(drawn[i], render_tuned(hyper, made.g, moved, codes[place])[0], atol=1e-4)
        assert (drawn[i] - render(made.g, moved)[0]).abs().max() > 1e-2


def test_one_sign_is_drawn_where_every_training_image_is_inverted(tmp_path):
    run, nets, sources, inverted = make_run(tmp_path, inverted=40)
    frame, _ = augment.augment_sources(run, nets, sources, inverted)
    assert len(frame) == 40 * 3 and 30 < (frame.alpha > 0).sum() < 90


def test_a_killed_making_goes_on_to_the_same_store(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / name, inverted=40) for name in ("straight", "broken")]
    augment.augment_sources(*runs[0])
    real, calls, clock = augment.measure_sources, [], iter(range(0, 10**6, 100))

    def dying(*words):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*words)

    with monkeypatch.context() as patch:
        patch.setattr(augment, "measure_sources", dying)
        patch.setattr(augment, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        patch.setattr(augment, "code_key", lambda *_: "same")
        with pytest.raises(KeyboardInterrupt):
            augment.augment_sources(*runs[1])
    with monkeypatch.context() as patch:
        patch.setattr(augment, "code_key", lambda *_: "same")
        counted = []
        patch.setattr(augment, "measure_sources", lambda *words: counted.append(1) or real(*words))
        augment.augment_sources(*runs[1])
    assert len(counted) == 1
    texts = [(run.folder / "tables" / "synthetic.csv").read_bytes() for run, *_ in runs]
    hashes = [store_facts(run.folder / "lmdb" / "synthetic")["sha256"] for run, *_ in runs]
    assert texts[0] == texts[1] and hashes[0] == hashes[1]


def test_a_generator_without_named_directions_makes_nothing_and_says_so(tmp_path):
    run, nets, sources, inverted = make_run(tmp_path)
    save_transformations(run.path("ckpt", "transformations.json"), dict.fromkeys(NAMES))
    frame, _ = augment.augment_sources(run, nets, sources, inverted)
    assert frame.empty and not (run.folder / "lmdb" / "synthetic").exists()
    first, again = augment.table1(run, frame, "LPIPS-random"), augment.augment_sources(run, nets, sources, inverted)[0]
    assert first.value.isna().all() and (first.reason != "").all() and again.empty
    assert augment.set_table(run, again).value.eq(0).all() and allot.draw_set(run, "2k", 40) == []


# --- provenance ---

@pytest.mark.parametrize("change,word", [({"lesion_id": "holdout-l3"}, "outside train"), ({"lesion_id": "test-l3"}, "outside train"),
                                         ({"source_id": "val2"}, "outside train"), ({"lesion_id": "nobody's"}, "no source in train"),
                                         ({"lesion_id": "train-l19"}, "another lesion"), ({"label": 6}, "another lesion")])
def test_a_planted_foreign_source_is_found(made, change, word):
    assert augment.check_provenance(made.run, made.frame) == len(made.frame)
    planted = made.frame.copy()
    planted.loc[5, list(change)] = list(change.values())
    with pytest.raises(DataRefused, match=word) as refusal:
        augment.check_provenance(made.run, planted)
    assert len(str(refusal.value).splitlines()) == 3


def test_an_inverted_holdout_image_never_becomes_a_synthetic_one(tmp_path):
    run, nets, sources, inverted = make_run(tmp_path)
    sources.loc[3, "source_id"] = "holdout3"
    with pytest.raises(DataRefused, match="not in train"):
        augment.augment_sources(run, nets, sources, inverted)
    assert not (run.folder / "tables" / "synthetic.csv").exists()


# --- sets ---

def test_the_sets_have_the_papers_sizes():
    run = resolve_run("paper", 0, root=__import__("pathlib").Path(__import__("tempfile").mkdtemp()))
    printed = published()["sets"]["per_transformation"]
    assert {name: allot.set_size(run, name, 10015) for name in SETS[1:]} == printed
    assert allot.set_size(run, "2k", 2003) == 80 and allot.set_size(run, "baseline", 10015) == 0
    with pytest.raises(ConfigError, match="12k"):
        allot.set_size(run, "12k", 10)


def test_draws_are_independent_whole_and_only_of_kept_images():
    frame = pd.DataFrame([(f"{name}{k}", name, k % 10 > 0) for name in NAMES for k in range(1000)],
                         columns=["image_id", "transformation", "kept"])
    kept = set(frame.image_id[frame.kept])
    draws = {name: allot.draw_from(frame, count, 0, name) for name, count in published()["sets"]["per_transformation"].items()
             if count <= 900}
    for name, drawn in draws.items():
        assert len(drawn) == len(set(drawn)) == 5 * published()["sets"]["per_transformation"][name] and set(drawn) <= kept
    shared = len(set(draws["2k"]) & set(draws["4k"]))
    expected = 2000 * 800 / 900
    assert abs(shared - expected) < 5 * (2000 * 8 / 9 * 1 / 9) ** 0.5 and shared < 2000
    shuffled = frame.sample(frac=1, random_state=0)
    assert allot.draw_from(shuffled, 400, 0, "2k") == draws["2k"] != allot.draw_from(frame, 400, 1, "2k")
    everything = allot.draw_from(frame, 2000, 0, "10k")
    assert set(everything) == kept and len(everything) == len(kept)


def test_a_set_without_synthetic_images_says_how_to_make_them(tmp_path):
    run = resolve_run("smoke", 0, root=tmp_path)
    assert allot.draw_set(run, "baseline", 40) == []
    with pytest.raises(DataMissing, match="10_augment"):
        allot.draw_set(run, "2k", 40)


# --- controls ---

WANTED = "baseline, 6k, steps-6k, duplicates-6k, classical-6k, inverted-6k, random-6k"


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    run, nets, sources, inverted = make_run(tmp_path_factory.mktemp("controls"))
    run = dataclasses.replace(run, profile=dataclasses.replace(run.profile, cls_sets=tuple(WANTED.split(", "))))
    augment.augment_sources(run, nets, sources, inverted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controls, "open_nets", lambda *_: nets)
        patch.setattr(controls.settle_strengths, "__defaults__", (4,))
        patch.setattr(controls, "inverted_sources", lambda _: (sources.source_id.tolist(), inverted))
        plan, settled = controls.pack_controls(run)
    return SimpleNamespace(run=run, nets=nets, sources=sources, inverted=inverted, plan=plan, settled=settled)


def test_every_control_adds_as_many_images_of_the_same_sources_and_labels(controlled):
    run, frame = controlled.run, pd.read_csv(controlled.run.folder / "tables" / "synthetic.csv").set_index("image_id")
    train, plain = open_images(run, "train"), allot.open_pool(run, "6k")
    n = len(train)
    assert plain.added == allot.draw_set(run, "6k", n) and len(plain.labels) == n + len(plain.added) == plain.draws
    for name in ("duplicates-6k", "classical-6k", "inverted-6k", "random-6k"):
        pool = allot.open_pool(run, name)
        assert pool.added == plain.added and pool.draws == plain.draws and torch.equal(pool.labels, plain.labels), name
        assert frame.label[pool.added].tolist() == pool.labels[n:].tolist()
    steps = allot.open_pool(run, "steps-6k")
    assert len(steps.labels) == n and steps.draws == plain.draws and steps.stores == ("train",)
    assert len(allot.batches(steps.labels, 16, 0, 0, steps.draws)) == len(allot.batches(plain.labels, 16, 0, 0, plain.draws))


def test_duplicates_are_the_photographs_and_lie_in_no_second_store(controlled):
    run, train = controlled.run, open_images(controlled.run, "train")
    pool, frame = allot.open_pool(run, "duplicates-6k"), pd.read_csv(run.folder / "tables" / "synthetic.csv").set_index("image_id")
    for k, name in enumerate(pool.added):
        photograph = train.batch([train.ids.index(frame.source_id[name])])[0]
        assert torch.equal(pool.images[len(train) + k][0], photograph)
    assert pool.stores == ("train",)


def test_inverted_images_are_the_inversions_once_a_source(controlled):
    run, store = controlled.run, Images(controlled.run.folder / "lmdb" / "controls")
    inverted = [name for name in store.ids if name.endswith("~inverted")]
    pool, frame = allot.open_pool(run, "inverted-6k"), pd.read_csv(run.folder / "tables" / "synthetic.csv").set_index("image_id")
    assert len(inverted) == frame.source_id[pool.added].nunique() < len(pool.added)
    order = controlled.sources.source_id.tolist()
    for k in (0, len(pool.added) - 1):
        place = order.index(frame.source_id[pool.added[k]])
        expected = to_uint8(render(controlled.nets.g, controlled.inverted.ws[[place]]))[0].int()
        shown = pool.images[40 + k][0].int()
        assert (shown - expected).abs().float().mean() < 4


def test_random_directions_are_orthogonal_to_the_reviewed_and_move_as_far(controlled):
    lpips = open_lpips(None)
    named = load_transformations(controlled.run.folder / "ckpt" / "transformations.json")
    few = pick(controlled.inverted, range(3))
    found, again = (controls.random_steps(controlled.nets, lpips, few, named, k) for k in (0, 1))
    assert list(found) == [name for name in named if named[name]]
    for name, t in found.items():
        assert abs(float(t.direction.norm()) - 1) < 1e-9 and t.layers == named[name].layers
        assert max(abs(float(t.direction @ other.direction)) for other in named.values() if other) < 1e-9
        assert not torch.allclose(t.direction, again[name].direction, atol=1e-3)
        far = []
        for step in (t, named[name]):
            before = to_float(to_uint8(render(controlled.nets.g, few.ws)))
            after = [to_float(to_uint8(render(controlled.nets.g, move(few.ws, step.direction, sign * step.alpha, step.layers))))
                     for sign in (1, -1)]
            far.append(float(sum(lpips(before, x, "last3").mean() for x in after)) / 2)
        assert far[0] == pytest.approx(far[1], rel=0.1) or t.alpha == pytest.approx(8 * named[name].alpha)


def test_classical_images_lie_as_far_from_the_photographs_as_the_transformed_ones(controlled):
    table = controls.strength_table(controlled.run).set_index(["control", "metric"])
    far = table.value.xs("lpips-random_last3", level="metric")
    assert far["duplicates"] == 0 and far["classical"] == pytest.approx(far["drawn"], rel=0.35)
    assert (table.n > 0).all() and (table.low <= table.value).all()


def test_classical_changes_depend_on_seed_and_id_only():
    x = torch.randint(0, 256, (3, 3, 24, 24), generator=rng(0), dtype=torch.uint8)
    whole = controls.classical(x, ["a", "b", "c"], 0.4, 0)
    assert torch.allclose(whole[1], controls.classical(x[1:2], ["b"], 0.4, 0)[0], atol=1e-6)
    assert not torch.allclose(whole, controls.classical(x, ["a", "b", "c"], 0.4, 1), atol=1e-2)
    assert torch.allclose(controls.classical(x, ["a", "b", "c"], 0.0, 0), to_float(x), atol=1e-5)


def test_controls_are_made_once_and_anew_where_a_code_changed(controlled, monkeypatch):
    monkeypatch.setattr(controls, "inverted_sources", lambda _: (controlled.sources.source_id.tolist(), controlled.inverted))
    monkeypatch.setattr(controls, "open_nets", lambda *_: pytest.fail("made again"))
    plan, settled = controls.pack_controls(controlled.run)
    assert plan.image_id.tolist() == controlled.plan.image_id.tolist() and settled == controlled.settled
    other = controlled.inverted._replace(ws=controlled.inverted.ws + 1)
    monkeypatch.setattr(controls, "inverted_sources", lambda _: (controlled.sources.source_id.tolist(), other))
    with pytest.raises(pytest.fail.Exception, match="made again"):
        controls.pack_controls(controlled.run)


def test_a_set_of_which_nothing_is_left_is_refused(controlled):
    drawn = allot.draw_set(controlled.run, "6k", 40)
    with pytest.raises(DataRefused, match="no synthetic image") as refusal:
        allot.open_pool(controlled.run, "6k", drop=drawn)
    assert len(str(refusal.value).splitlines()) == 3
    assert len(allot.open_pool(controlled.run, "6k", drop=drawn[:2]).added) == len(drawn) - 2


def test_a_choice_of_images_joins_by_its_name_and_holds_only_kept_ones(controlled):
    run, kept = controlled.run, pd.read_csv(controlled.run.folder / "tables" / "synthetic.csv")
    kept = kept[kept.kept].image_id.tolist()
    with pytest.raises(DataMissing, match="11_selection"):
        allot.open_pool(run, "clustered-6k")
    file = run.path("tables", "chosen-clustered-6k.csv")
    pd.DataFrame({"image_id": kept[:5]}).to_csv(file, index=False)
    assert allot.open_pool(run, "clustered-6k").added == sorted(kept[:5])
    pd.DataFrame({"image_id": [*kept[:5], "stranger"]}).to_csv(file, index=False)
    with pytest.raises(DataRefused, match="stranger"):
        allot.open_pool(run, "clustered-6k")


# --- table and sheet ---

def test_table_1_has_the_papers_numbers_for_the_papers_metric_only(made):
    random, trained = (augment.table1(made.run, made.frame, name) for name in ("LPIPS-random", "LPIPS"))
    assert list(random)[:2] == ["transformation", "metric"] and {"lpips", "lpips_last3"} <= set(random.metric)
    assert random.paper.isna().all()
    printed = trained[trained.metric == "lpips_last3"].set_index("transformation")
    assert printed.paper.to_dict() == published()["lpips"] and trained[trained.metric != "lpips_last3"].paper.isna().all()
    assert printed.value["SV"] != printed.value["SV"] and printed.n["SV"] == 0 and "earned" in printed.reason["SV"]
    part = made.frame[made.frame.transformation == "BCV"].lpips_last3
    assert printed.value["BCV"] == pytest.approx(part.mean()) and printed.low["BCV"] <= part.mean() <= printed.high["BCV"]


def test_the_sheet_leaves_an_unearned_name_empty(made):
    rows = augment.sheet_rows(made.run, made.sources, made.frame, 4)
    train = open_images(made.run, "train")
    kinds = [int(train.labels[train.ids.index(made.sources.source_id[i])]) for i in rows]
    assert len(set(kinds)) == 4
    fig, data = augment.draw_sheet(made.run, made.nets, made.sources, made.inverted, rows)
    assert len(fig.axes) == 4 * 7 and data.lpips_last3[data.column == "SV"].isna().all()
    assert data.lpips_last3[data.column == "PS"].notna().all()
    texts = [t.get_text() for ax in fig.axes for t in ax.texts]
    assert len(texts) == 2 and all("not found" in t for t in texts)
