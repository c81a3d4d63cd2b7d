"""Closed-form factorization against its definition, restated here by hand and in float64 (RELIABILITY C5)."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from dermgan.core import rng
from dermgan.factorize import (GROUPS, NAMES, Transformation, affine_names, candidates, draw_codes, effects, factorize, fix_signs,
                               generator_key, group_effects, layer_groups, layers_label, load_transformations, lpips_step,
                               match, mean_interval, merit, move, name_directions, random_directions, render,
                               save_transformations, step_std, style_inputs, style_rows)
from dermgan.stylegan2 import Generator

ROWS = torch.tensor([[3.0, 0, 4, 0], [0, 2, 0, 0], [0, 0, 5, 12]], dtype=torch.float64)


def generator(w_dim=24, image_px=32, seed=0):
    torch.manual_seed(seed)
    g = Generator(image_px, z_dim=16, w_dim=w_dim, channel_base=256, channel_max=16, mapping_layers=2)
    return g.eval().requires_grad_(False)


def fake(weights):
    "An 8 px generator that holds these style weights: first convolution, two of 8 px, both RGB layers."
    layer = lambda w: SimpleNamespace(affine=SimpleNamespace(weight=w))
    modules = {name: layer(weights.get(name, torch.zeros(1, 4, dtype=torch.float64)))
               for name in ("b4.conv1", "b8.conv0", "b8.conv1", "b8.torgb", "b4.torgb")}
    return SimpleNamespace(num_ws=4, synthesis=SimpleNamespace(get_submodule=modules.__getitem__))


@pytest.mark.parametrize("variant", ["sefa", "raw"])
def test_a_hand_computed_case_of_three_rows(variant):
    rows = np.array(ROWS.tolist())
    if variant == "sefa":
        rows = rows / np.array([[5.0], [2.0], [13.0]])
    gram = sum(np.outer(r, r) for r in rows)
    found = factorize(fake({"b4.conv1": ROWS}), [0], variant)
    assert found.vectors.shape == (3, 4) and found.vectors.dtype == torch.float64
    for v, value in zip(found.vectors.numpy(), found.values.numpy()):
        assert np.abs(gram @ v - value * v).max() < 1e-10
        assert v[np.abs(v).argmax()] > 0
    assert list(found.values) == sorted(found.values, reverse=True)
    assert abs(float(found.values.sum()) - (3 if variant == "sefa" else 25 + 4 + 169)) < 1e-10


def test_sefa_and_raw_answers_of_an_orthogonal_case():
    rows = torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64))
    rows = torch.cat([rows, torch.zeros(3, 1, dtype=torch.float64)], 1)
    raw = factorize(fake({"b4.conv1": rows}), [0], "raw")
    assert torch.allclose(raw.values, torch.tensor([9.0, 4.0, 1.0], dtype=torch.float64), atol=1e-10)
    assert torch.allclose(raw.vectors, torch.eye(4, dtype=torch.float64)[[1, 2, 0]], atol=1e-10)
    doubled = torch.cat([rows, rows[:1], rows[:1]])
    sefa = factorize(fake({"b4.conv1": doubled}), [0], "sefa")
    assert torch.allclose(sefa.values[:3], torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64), atol=1e-10)
    assert torch.allclose(sefa.vectors[0], torch.eye(4, dtype=torch.float64)[0], atol=1e-10)


def test_each_variant_takes_its_own_layers():
    g = generator()
    names = {v: sum(affine_names(g.num_ws, v).values(), []) for v in ("sefa", "raw")}
    convs = ["b4.conv1"] + [f"b{px}.conv{i}" for px in (8, 16, 32) for i in (0, 1)]
    assert sorted(names["sefa"]) == sorted([*convs, "b32.torgb"]) and sorted(names["raw"]) == sorted([*convs, "b4.torgb"])
    count = sum(g.synthesis.get_submodule(n).affine.weight.shape[0] for n in names["raw"])
    assert style_rows(g, "all", "raw").shape == (count, 24)
    assert torch.allclose(style_rows(g, "all", "sefa").norm(dim=1), torch.ones(1, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("variant", ["sefa", "raw"])
@pytest.mark.parametrize("layers", ["all", slice(0, 3), (2, 6), [1, 5]])
def test_svd_equals_eigh_and_directions_are_orthonormal(variant, layers):
    g = generator()
    found, rows = factorize(g, layers, variant), style_rows(g, layers, variant)
    u, singular, v = np.linalg.svd(rows.numpy(), full_matrices=False)
    assert np.abs(found.values.numpy() - singular**2).max() < 1e-10 * singular[0] ** 2
    assert np.abs(np.abs((found.vectors.numpy() * v).sum(1)) - 1).max() < 1e-8
    assert (found.vectors @ found.vectors.T - torch.eye(len(rows[0]))).abs().max() < 1e-10


@pytest.mark.parametrize("variant", ["sefa", "raw"])
def test_a_planted_direction_is_recovered(variant):
    g = generator()
    planted = torch.nn.functional.normalize(torch.randn(24, generator=rng(1, "planted"), dtype=torch.float64), dim=0)
    for names in affine_names(g.num_ws, variant).values():
        for name in names:
            weight = g.synthesis.get_submodule(name).affine.weight
            side = torch.randn(len(weight), 1, generator=rng(1, name)).sign() * 4
            weight.copy_(0.01 * torch.randn(weight.shape, generator=rng(2, name)) + side * planted)
    assert abs(float(factorize(g, "all", variant).vectors[0] @ planted)) > 0.9999


def test_signs_do_not_depend_on_the_order_of_rows_or_the_sign_of_the_solver():
    rows = style_rows(generator())
    for seed in range(5):
        order = torch.randperm(len(rows), generator=rng(seed, "order"))
        a = torch.linalg.eigh(rows.T @ rows)[1].T
        b = torch.linalg.eigh(rows[order].T @ rows[order])[1].T * (1 - 2 * (torch.arange(24) % 2))[:, None]
        assert (fix_signs(a) - fix_signs(b)).abs().max() < 1e-8
    tie = torch.tensor([[-0.5, 0.5 + 1e-12, 0.5, -0.5]], dtype=torch.float64)
    assert torch.equal(fix_signs(tie), fix_signs(-tie)) and fix_signs(tie)[0, 0] > 0


def test_layer_ranges_are_resolved_or_refused():
    assert style_inputs("all", 10) == list(range(10)) == style_inputs(slice(None), 10)
    assert style_inputs((0, 4), 10) == style_inputs([3, 0, 1, 2], 10) == [0, 1, 2, 3]
    for wrong in ([], [10], [-1], (4, 4), slice(20, 30)):
        with pytest.raises(ValueError, match="0 to 9"):
            style_inputs(wrong, 10)
    with pytest.raises(ValueError, match="stacks no layer"):
        style_rows(generator(), [7], "raw")
    thirds = layer_groups(16)
    assert sorted(thirds["early"] + thirds["middle"] + thirds["late"]) == thirds["all"] == list(range(16))
    assert layers_label([0, 1, 2]) == "0-2" and layers_label([5]) == "5" and layers_label([1, 3]) == "1+3"


def test_move_touches_only_its_layers_and_refuses_a_direction_that_is_not_a_unit():
    ws, v = torch.randn(3, 8, 24, dtype=torch.float64), torch.nn.functional.normalize(torch.ones(24, dtype=torch.float64), dim=0)
    before = ws.clone()
    moved = move(ws, v, torch.tensor([0.0, 1.0, -2.0]), [2, 4])
    by_hand = before.clone()
    for i, alpha in enumerate((0.0, 1.0, -2.0)):
        for layer in (2, 4):
            by_hand[i, layer] += alpha * v
    assert torch.equal(ws, before) and torch.allclose(moved, by_hand, atol=1e-15)
    assert torch.allclose(move(move(ws, v, 1.5), v, -1.5), ws)
    for wrong in (v * 1.01, v[None], torch.zeros(24)):
        with pytest.raises(ValueError, match="unit"):
            move(ws, wrong, 1.0)


def test_a_step_in_deviations_is_the_deviation_of_the_projection():
    g = generator()
    v = factorize(g).vectors[:3]
    w = draw_codes(g, 4096, 0)[:, 0].double().numpy()
    by_hand = [(w @ d.numpy()).std(ddof=1) for d in v]
    assert np.allclose(step_std(g, v).numpy(), by_hand)


def test_the_step_of_equal_lpips_is_found_and_capped():
    axis = torch.eye(24, dtype=torch.float64)[0]
    bright = SimpleNamespace(features=lambda x: [x.mean((1, 2, 3))[:, None]],
                             distance=lambda a, b, layers: (a[0] - b[0]).square()[:, 0])
    g = SimpleNamespace(synthesis=lambda ws, noise: 0.1 * ws.mean(1)[:, :1, None, None].expand(-1, 3, 8, 8))
    t = Transformation("", axis, list(range(8)), 0.0)
    alpha, reached = lpips_step(g, torch.zeros(2, 8, 24), t, bright, 0.01, unit=1.0)
    assert abs(alpha - 1) < 0.03 and abs(reached - 0.01) < 6e-4
    alpha, reached = lpips_step(g, torch.zeros(2, 8, 24), t, bright, 0.9, unit=1.0)
    assert alpha == 4.0 and reached < 0.9


def test_transformations_survive_a_file(tmp_path):
    v = factorize(generator()).vectors[3]
    kept = {"SV": Transformation("SV", v, [1, 2], 0.1 + 0.2, 3), "PS": None}
    file = save_transformations(tmp_path / "t.json", kept, {"seed": 1})
    again = load_transformations(file)
    assert torch.equal(again["SV"].direction, v) and again["SV"][2:] == kept["SV"][2:] and again["PS"] is None
    assert json.loads(file.read_text())["made_by"] == {"seed": 1}


def test_effects_are_changes_in_standard_deviations():
    g = SimpleNamespace(num_ws=2, synthesis=lambda ws, noise: ws.mean(1)[:, :3, None, None].expand(-1, 3, 4, 4) * 0.1)
    ws = torch.randn(60, 1, 5, generator=rng(0, "ws")).expand(-1, 2, -1)
    measure = lambda x: pd.DataFrame({"red": x[:, 0].mean((1, 2)).numpy(),
                                      "orientation": 89.0 + 0 * x[:, 0, 0, 0].numpy() + 2 * np.sign(x[:, 1, 0, 0].numpy()).clip(0) - 180 * (x[:, 1, 0, 0].numpy() > 0)})
    moves = [Transformation("", torch.eye(5, dtype=torch.float64)[k], [0, 1], 0.4, k) for k in range(2)]
    frame = effects(g, moves, ws, measure)
    red = frame[(frame.attribute == "red") & (frame.direction == 0)].iloc[0]
    assert abs(red.value - 0.4 / float(ws[:, 0, 0].std())) < 1e-4 and red.n == 60
    turned = frame[(frame.attribute == "orientation") & (frame.direction == 1)].iloc[0]
    unwrapped = effects(g, moves[1:], ws, lambda x: measure(x)[["orientation"]].rename(columns={"orientation": "degrees"})).iloc[0]
    assert turned.value > 0 > unwrapped.value, "89 degrees to -89 is a turn by 2, not by -178"
    interval = mean_interval(torch.tensor([1.0, 2.0, 3.0, float("nan")]))
    assert interval["n"] == 3 and abs(interval["high"] - 2 - 1.96 / math.sqrt(3)) < 1e-12


def measured(*rows):
    names = sum(GROUPS.values(), ())
    frame = pd.DataFrame([(k, "0-3", n, row.get(n, 0.01)) for k, row in enumerate(rows) for n in names],
                         columns=["direction", "layers", "attribute", "value"])
    return frame.assign(low=frame.value - 0.1, high=frame.value + 0.1, n=40)


def moves_for(count, vectors=None):
    axes = torch.eye(24, dtype=torch.float64) if vectors is None else vectors
    return [Transformation("", axes[k], [0, 1, 2, 3], 1.0, k) for k in range(count)]


def test_names_are_earned_and_never_filled_by_the_nearest():
    rows = [{"x": 0.24}, {"area": 0.5, "y": 0.31}, {"skin_a": 0.4, "area": 0.3}, {"lesion_L": 0.9}]
    assert name_directions(measured(*rows), moves_for(4)) == dict.fromkeys(NAMES)
    named = name_directions(measured({"x": 0.26}, {"x": 0.9}, {"area": -0.4, "lesion_L": 0.4}), moves_for(3))
    assert named["PS"].number == 1 and named["SPV"].number == 2 and named["SPV"].name == "SPV"
    assert named["SV"] is named["GV"] is named["BCV"] is None


def test_an_uncertain_effect_earns_nothing():
    frame = measured({"border": 0.5})
    assert name_directions(frame, moves_for(1))["GV"].number == 0
    assert name_directions(frame.assign(low=frame.value - 0.6), moves_for(1))["GV"] is None


def test_one_direction_never_serves_two_names():
    axes = torch.eye(24, dtype=torch.float64)
    twins = torch.stack([axes[0], torch.nn.functional.normalize(axes[0] + 0.2 * axes[1], dim=0)])
    named = name_directions(measured({"area": 0.9}, {"x": 0.5}), moves_for(2, twins))
    assert named["SV"].number == 0 and named["PS"] is None
    apart = [m._replace(layers=[k]) for k, m in enumerate(moves_for(2, twins))]
    frame = measured({"area": 0.9}, {"x": 0.5})
    frame["layers"] = frame.direction.astype(str)
    named = name_directions(frame, apart)
    assert named["SV"].number == 0 and named["PS"].number == 1


def test_merit_by_hand():
    size = {"size": 0.8, "pigment": 0.5, "skin": 0.1, "shape": 0.2, "position": 0.2}
    sure = dict.fromkeys(size, True)
    length = math.sqrt(0.64 + 0.25 + 0.01 + 0.04 + 0.04)
    assert abs(merit("SPV", size, sure, 0.25, 0.6) - 0.5 * (0.5 * math.sqrt(2) / length)) < 1e-12
    assert merit("SV", size, sure, 0.25, 0.6) == 0 and merit("SPV", size, sure | {"pigment": False}, 0.25, 0.6) == 0
    assert group_effects(measured({"x": 0.3, "y": -0.7}))[0]["position"] == 0.7


def test_the_match_counts_pure_directions():
    frame = measured({"area": 0.6, "x": 0.8}, {"y": 0.5})
    found = match(frame, {"size": "area", "x": "x", "y": "y"})
    assert np.allclose(found.value, [0.6, 0.8, 0.5 / math.sqrt(0.25 + 2e-4)], atol=1e-3)
    assert found.direction.tolist() == [0, 0, 1]


def test_candidates_controls_and_digests_are_deterministic():
    g, again = generator(), generator()
    a, b = candidates(g, "sefa", 3), candidates(again, "sefa", 3)
    assert len(a) == 12 and all(torch.equal(x.direction, y.direction) and x.alpha == y.alpha for x, y in zip(a, b))
    vectors = torch.stack([t.direction for t in random_directions(g, 5, 0)])
    assert (vectors @ vectors.T - torch.eye(5)).abs().max() < 1e-12
    assert generator_key(g) == generator_key(again) != generator_key(generator(seed=1))
    assert render(g, draw_codes(g, 3, 0)).abs().max() <= 1
