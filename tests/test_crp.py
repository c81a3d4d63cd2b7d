"""Conditional heatmaps: what adds up, what passes by, what is refused; crops, names, and the rule that picks an image."""
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from dermgan import crp
from dermgan.core import ConfigError
from dermgan.crp import (cells_to_compare, concept_names, conditional_heatmaps, crop, label, overlay, rank_images,
                         receptive_fields, title)
from dermgan.lrp import attribute, layer_names, tap
from dermgan.references import DEFAULT, concept_relevance, model_key
from test_lrp import hooks, images, tiny


@pytest.mark.parametrize("layer", ["features.conv0", "features.pool0", "features.denseblock1", "features.transition1",
                                   "features.transition3", "features.denseblock4"])
def test_disjoint_concepts_add_up_to_the_whole(layer):
    net, x, targets = tiny(), images(2), torch.tensor([0, 2])
    count = concept_relevance(net, x, targets, layer).shape[1]
    maps = conditional_heatmaps(net, x, targets, layer, list(range(count)))
    whole = attribute(net, x, targets).sum(1)
    assert (maps.sum(1) - whole).abs().max() < 1e-8 * whole.abs().max() and hooks(net) == 0
    assert torch.allclose(conditional_heatmaps(net, x, targets, layer, [[0, 2], [1]])[:, 0], maps[:, 0] + maps[:, 2],
                          atol=1e-12 * whole.abs().max().item())


def test_within_a_dense_block_relevance_passes_by():
    net, x, targets = tiny(), images(2), torch.tensor([0, 1])
    layer = "features.denseblock2.denselayer1"
    assert layer in layer_names(net)
    through = conditional_heatmaps(net, x, targets, layer, [range(4)])[:, 0]
    rest = attribute(net, x, targets).sum(1) - through
    old = conditional_heatmaps(net, x, targets, "features.denseblock2", [range(4)])[:, 0]
    assert rest.abs().sum() > 0.01 * through.abs().sum() and old.shape == rest.shape


def test_each_image_may_have_concepts_of_its_own():
    net, x, targets = tiny(), images(2), torch.tensor([0, 2])
    count = tap(net, DEFAULT).out_channels
    own = conditional_heatmaps(net, x, targets, DEFAULT, torch.tensor([[0, 1], [count - 1, 2]]))
    every = conditional_heatmaps(net, x, targets, DEFAULT, list(range(count)))
    assert torch.equal(own[0, 1], every[0, 1]) and torch.equal(own[1, 0], every[1, count - 1])


@pytest.mark.parametrize("concept", [-1, 10**6])
def test_a_concept_that_does_not_exist_is_refused(concept):
    net = tiny()
    count = tap(net, DEFAULT).out_channels
    with pytest.raises(ConfigError, match=f"0 to {count - 1}"):
        conditional_heatmaps(net, images(1), torch.tensor([0]), DEFAULT, [concept])
    with pytest.raises(ConfigError, match="features.transition1"):
        conditional_heatmaps(net, images(1), torch.tensor([0]), "features.transition4", [0])
    assert hooks(net) == 0 and "forward" not in vars(net)


def test_receptive_fields_of_all_positions_add_up_to_the_concept():
    net, x, targets = tiny(), images(1), torch.tensor([1])
    concept = concept_relevance(net, x, targets).abs().argmax(1)
    parts = [receptive_fields(net, x, targets, DEFAULT, concept, torch.tensor([p])) for p in range(4)]
    whole = conditional_heatmaps(net, x, targets, DEFAULT, concept[:, None])[:, 0]
    assert whole.abs().max() > 0 and torch.allclose(sum(parts), whole, atol=1e-12 * whole.abs().max().item())


@pytest.mark.parametrize("place", [(slice(0, 4), slice(0, 4)), (slice(60, 64), slice(30, 36)), (slice(10, 12), slice(5, 55))])
def test_a_crop_is_a_square_within_the_image_that_holds_the_field(place):
    picture, field = torch.arange(3 * 64 * 64).remainder(256).view(3, 64, 64).to(torch.uint8), torch.zeros(64, 64)
    field[place] = -1
    cut = crop(picture, field)
    assert cut.ndim == 3 and cut.shape[0] == cut.shape[1] <= 64 and cut.dtype == np.uint8
    assert cut.shape[0] > max(s.stop - s.start for s in place)
    assert crop(picture, torch.zeros(64, 64)).shape == (64, 64, 3)


def test_colours_are_symmetric_at_zero():
    grey, ramp = torch.full((3, 16, 16), 120, dtype=torch.uint8), torch.linspace(-1, 1, 16).expand(16, 16)
    one, other = overlay(ramp, grey), overlay(5 * ramp, grey)
    assert np.allclose(one, other) and np.allclose(overlay(torch.zeros(16, 16), grey), overlay(torch.zeros(16, 16), grey)[0, 0])
    assert one[8, -1, 0] > one[8, -1, 2] and one[8, 0, 2] > one[8, 0, 0]


def test_names_count_only_for_the_network_they_were_given_to(tmp_path, monkeypatch):
    net, file = tiny(), tmp_path / "figures" / "smoke" / "concepts.yaml"
    run = SimpleNamespace(profile=SimpleNamespace(name="smoke"))
    monkeypatch.setattr(crp, "resource", lambda name: tmp_path / name)
    assert concept_names(run, net, DEFAULT) == {} and label(3, {}) == "concept 3"
    file.parent.mkdir(parents=True)
    row = "- {{layer: {}, concept: {}, name: {}, who: {}, model: {}}}\n"
    file.write_text(row.format(DEFAULT, 3, "hair", "AB", model_key(net)) + row.format(DEFAULT, 4, "ruler", "AB", "0" * 16)
                    + row.format("features.transition1", 5, "corner", "AB", model_key(net))
                    + row.format(DEFAULT, 6, "nobody", "''", model_key(net)))
    names = concept_names(run, net, DEFAULT)
    assert names == {3: "hair"} and "hair" in label(3, names)
    for broken in ("- {layer: x}\n", "a: [", "just words\n"):
        file.write_text(broken)
        with pytest.raises(ConfigError, match="concepts.yaml cannot be read"):
            concept_names(run, net, DEFAULT)


def finished(folder, name, table, labels):
    "A finished cell with its record and probabilities, as 11_classify leaves them."
    arch, chosen, _, seed = name.split("-")
    made = {"arch": arch, "set": chosen, "filtered": False, "seed": int(seed[1:])}
    (folder / f"{name}.json").write_text(json.dumps({"classes": ["MEL", "BKL", "NV"], "made_by": made, "history": {}}))
    np.savez(folder / f"{name}.npz", test_probabilities=table, test_labels=labels, test_ids=np.array(list("wxyz")),
             test_lesion_ids=np.array(list("llmn")))


def test_the_rule_takes_the_image_that_meets_it_most_surely_or_the_nearest(tmp_path, monkeypatch):
    labels = np.array([0, 0, 0, 1])
    base = np.array([[.2, .7, .1], [.1, .8, .1], [.6, .3, .1], [.1, .9, 0]], np.float32)
    other = np.array([[.6, .3, .1], [.55, .3, .15], [.9, .1, 0], [.9, .1, 0]], np.float32)
    folder = tmp_path / "ckpt" / "classify"
    folder.mkdir(parents=True)
    names = ["net-baseline-plain-s0", "net-6k-plain-s0"]
    for name, table in zip(names, (base, other)):
        finished(folder, name, table, labels)
    monkeypatch.setattr(crp, "evaluation_splits", lambda run: ("test",))
    order = rank_images(SimpleNamespace(folder=tmp_path), names)
    assert order.image_id.tolist() == ["x", "w", "y"] and order.value.tolist()[:2] == [0, 0]
    assert order.value[2] == pytest.approx(0.3, abs=1e-6) and order["SA-6k, MEL"].tolist() == pytest.approx([.55, .6, .9], abs=1e-6)
    assert order.lesion_id.tolist() == ["l", "l", "m"]
    alone = rank_images(SimpleNamespace(folder=tmp_path), names[:1])
    assert isinstance(alone, pd.DataFrame) and alone.image_id.tolist() == ["x", "w", "y"]


def test_the_pair_is_of_finished_synthetic_sets_and_a_hole_is_no_partner(tmp_path):
    folder, sets = tmp_path / "ckpt" / "classify", ("baseline", "2k", "6k", "8k", "8k-filter", "duplicates-6k")
    folder.mkdir(parents=True)
    run = SimpleNamespace(folder=tmp_path, profile=SimpleNamespace(cls_archs=("big", "net"), cls_sets=sets))
    outcome = lambda name, reason: (folder / f"net-{name}-plain-s0.outcome").write_text(json.dumps({"reason": reason}))
    assert cells_to_compare(run) == ["net-baseline-plain-s0"]
    for name in ("baseline", "2k", "8k", "duplicates-6k"):
        outcome(name, "")
    outcome("6k", "DataRefused: no synthetic image")
    assert cells_to_compare(run) == ["net-baseline-plain-s0", "net-8k-plain-s0"]
    outcome("6k", "")
    assert cells_to_compare(run) == ["net-baseline-plain-s0", "net-6k-plain-s0"]
    assert [title(cell) for cell in cells_to_compare(run)] == ["baseline", "SA-6k"]
