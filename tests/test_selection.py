"""Clusters, draws in turns, four scores and a screen, each against a slow restatement."""
import numpy as np
import pandas as pd
import pytest
import torch

from dermgan import selection
from dermgan.allot import draw_set, set_size
from dermgan.core import CLASSES, DataMissing, SETS, resolve_run, save_atomic
from dermgan.metrics import open_lpips
from dermgan.stylegan2 import Discriminator
from dermgan.store import Images, pack_images


def frame_of(clusters, transformations=("SV", "PS"), signs=("+", "-")):
    "Synthetic images of sources with a cluster each."
    rows = [(f"s{k:02d}-{t}{sign}", f"s{k:02d}", t, True, c, 0.1 * k) for k, c in enumerate(clusters) for t in transformations for sign in signs]
    return pd.DataFrame(rows, columns=["image_id", "source_id", "transformation", "kept", "cluster", "distance"])


def test_a_draw_in_turns_is_level_over_clusters_and_spares_sources_already_drawn():
    frame = frame_of([0] * 20 + [1] * 4 + [2] * 4)
    drawn = frame.set_index("image_id").loc[selection.draw_in_turns(frame, 9)]
    assert drawn.groupby(["transformation", "cluster"]).size().eq(3).all() and len(drawn) == 18
    assert drawn.groupby("source_id").size().max() == 2 and drawn[drawn.cluster == 0].source_id.is_unique
    first = drawn[drawn.transformation == "PS"]
    assert {"s00", "s20", "s24"} <= set(first.source_id)
    assert selection.draw_in_turns(frame, 9) == selection.draw_in_turns(frame.sample(frac=1, random_state=1), 9)


def test_what_was_not_kept_is_never_drawn_and_a_shortage_takes_all():
    frame = frame_of([0, 1, 2]).assign(kept=lambda f: f.source_id != "s01")
    drawn = selection.draw_in_turns(frame, 99)
    assert len(drawn) == 8 and not any(name.startswith("s01") for name in drawn)


def test_clusters_follow_the_codes_and_never_outnumber_them():
    draw = torch.Generator().manual_seed(0)
    centres = 8 * torch.randn(4, 6, 5, generator=draw)
    codes = torch.cat([c + 0.1 * torch.randn(10, 6, 5, generator=draw) for c in centres])
    found = selection.cluster_codes(codes, 3, k=4)
    assert (pd.crosstab(found.cluster, np.repeat(range(4), 10)) == 10).sum().sum() == 4
    assert selection.cluster_codes(codes, 3).equals(selection.cluster_codes(codes, 3)) and selection.cluster_codes(codes, 3).cluster.nunique() == 7
    assert len(selection.cluster_codes(codes[:2], 0, k=9)) == 2
    mean = codes[:10].flatten(1).double()
    apart = (mean - mean.mean(0)).norm(dim=1)
    assert np.allclose(found.distance[:10], apart, atol=0.05)


def test_density_is_naeems_in_double_precision():
    draw = torch.Generator().manual_seed(0)
    train, x = torch.randn(60, 3, generator=draw), torch.randn(20, 3, generator=draw)
    slow = np.zeros(20)
    points, asked = train.double().numpy(), x.double().numpy()
    for row in points:
        reach = np.sort(np.linalg.norm(points - row, axis=1))[5]
        slow += np.linalg.norm(asked - row, axis=1) < reach
    assert np.allclose(selection.density_of(x, train), slow / 5)


def test_the_critic_judges_each_image_alone(tmp_path):
    torch.manual_seed(1)
    run = resolve_run("smoke", 0, {}, root=tmp_path)
    p = run.profile
    with pytest.raises(DataMissing, match="no discriminator"):
        selection.open_critic(run)
    net = Discriminator(p.image_px, p.channel_base, p.channel_max)
    save_atomic(run.path("ckpt", "gan.pt"), {"d": net.state_dict()})
    critic, images = selection.open_critic(run), torch.rand(6, 3, 32, 32) * 2 - 1
    said = selection.judge(critic, images)
    with torch.no_grad():
        alone = torch.cat([net(image[None]) for image in images])[:, 0]
    assert torch.allclose(said, alone, atol=1e-5) and torch.allclose(said[2:5], selection.judge(critic, images[2:5]), atol=1e-5)


def test_thresholds_come_from_photographs_alone_and_the_screen_asks_all_judges():
    draw = np.random.default_rng(0)
    photos = pd.DataFrame({"density": draw.random(200), "critic": draw.normal(size=200), "classifier": np.nan})
    limits = selection.thresholds(photos, draw.random(100))
    assert (photos.density < limits["density"]).mean() == 0.05 and (photos.critic < limits["critic"]).mean() == 0.05
    assert np.isnan(limits["classifier"]) and np.isnan(selection.thresholds(photos, np.ones(9))["fidelity"])
    made = pd.DataFrame({"fidelity": draw.random(80), "density": draw.random(80), "critic": draw.normal(size=80), "classifier": np.nan})
    passed = selection.screen(made, limits)
    slow = [(f <= limits["fidelity"], d >= limits["density"], c >= limits["critic"], True) for f, d, c, _ in made.itertuples(index=False)]
    assert passed[["fidelity", "density", "critic", "classifier"]].to_numpy().tolist() == [list(row) for row in slow]
    rows = pd.DataFrame(selection.screen_rows(passed, limits, pd.Series(np.arange(80) // 4), 400, 0),
                        columns=["score", "threshold", "value", "low", "high", "n", "reason"]).set_index("score")
    assert rows.value["all together"] == np.mean([all(row) for row in slow]) and rows.low["critic"] < rows.value["critic"] < rows.high["critic"]
    assert rows.reason["classifier"] == "no trained baseline" and np.isnan(rows.value["classifier"])


def test_intervals_of_shares_are_wider_where_a_lesion_passes_as_a_whole():
    limits, passed = {"density": 0.0}, pd.DataFrame({"density": np.repeat([True, False], 40)})
    width = {}
    for name, lesions in (("alone", np.arange(80)), ("tens", np.arange(80) // 10)):
        row = selection.screen_rows(passed, limits, pd.Series(lesions), 2000, 0)[0]
        width[name] = row[4] - row[3]
    assert width["tens"] == pytest.approx(width["alone"] * 10**0.5, rel=0.2)


def test_pairs_of_one_lesion_are_two_photographs_of_it(tmp_path):
    lpips, draw = open_lpips(None), np.random.default_rng(0)
    pack_images(tmp_path / "val", list(draw.integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)), [f"i{k}" for k in range(9)], [0] * 9,
                ["a", "b", "a", "c", "b", "a", "d", "e", "f"], CLASSES, 64)
    val = Images(tmp_path / "val")
    found = selection.same_lesion_distances(val, lpips)
    with torch.no_grad():
        expected = [float(lpips(val.batch([i]) / 127.5 - 1, val.batch([j]) / 127.5 - 1, "last3")) for i, j in ((0, 2), (1, 4))]
    assert np.allclose(sorted(found), sorted(expected), rtol=1e-4)


def test_a_choice_is_read_by_the_sets_it_was_made_for(tmp_path):
    run = resolve_run("smoke", 0, {"cls_sets": "baseline, 2k, clustered-2k, screened-2k"}, root=tmp_path)
    frame = frame_of([0] * 20 + [1] * 5).assign(passed=lambda f: f.source_id < "s12")
    frame.assign(lesion_id=frame.source_id).to_csv(run.path("tables", "synthetic.csv"), index=False)
    rows = selection.write_choices(run, frame, 250).set_index("set")
    count = set_size(run, "2k", 250)
    clustered, screened = (draw_set(run, f"{kind}-2k", 250) for kind in ("clustered", "screened"))
    assert len(clustered) == len(screened) == 2 * count == rows.value["clustered-2k"] and rows.n["screened-2k"] == 2 * count
    assert clustered == selection.draw_in_turns(frame, count) and set(frame.set_index("image_id").passed[screened]) == {True}
    assert set(rows.index) == {f"{kind}-{size}" for kind in ("clustered", "screened") for size in SETS[1:]}


def test_a_better_covering_choice_is_seen_and_an_equal_one_is_not():
    draw = np.random.default_rng(0)
    places = np.concatenate([draw.normal(0, 0.3, (60, 2)), draw.normal(9, 0.3, (5, 2))])
    val = np.concatenate([draw.normal(0, 0.3, (10, 2)), draw.normal(9, 0.3, (10, 2))])
    frame = frame_of([0] * 60 + [1] * 5, ("SV",), ("+",))
    apart, within = (np.linalg.norm(a[:, None] - places[None], axis=2) for a in (val, places))
    rows = pd.DataFrame(selection.compare_choice(selection.draw_in_turns(frame, 6), frame, 6, apart, within, 0), columns=["choice", "metric", "value", "low", "high", "n"])
    gap = rows[(rows.choice == "difference") & rows.metric.str.startswith("validation")].iloc[0]
    ours = rows[(rows.choice == "clustered")].iloc[0]
    at = [frame.image_id.tolist().index(name) for name in selection.draw_in_turns(frame, 6)]
    assert ours.value == pytest.approx(np.mean([min(apart[i, j] for j in at) for i in range(20)])) and gap.value < 0 and gap.n == 6
