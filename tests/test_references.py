"""References: the loudest images by a plain sort, resumed bit for bit, refused for another network, memory bounded."""
import numpy as np
import pytest
import torch
from torch import nn

from dermgan import references
from dermgan.core import DataMissing, RunMismatch, import_torchvision, load_state, rng
from dermgan.lrp import attribute, taken, explained
from dermgan.allot import standardise
from dermgan.references import (DEFAULT, add_batch, collect, concept_relevance, empty_table, merge, model_key,
                                read_references, relative)
from dermgan.store import Images, pack_images, to_float


def tiny(seed=0):
    torch.manual_seed(seed)
    net = import_torchvision().models.DenseNet(4, (1, 1, 1, 1), 8, num_classes=3)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.copy_(0.2 * torch.randn(part.num_features))
            part.bias.data.copy_(0.2 * torch.randn(part.num_features))
    return net.eval()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "toys"
    pictures = (torch.rand(23, 32, 32, 3, generator=rng(0, "toys")) * 255).to(torch.uint8).numpy()
    names = [f"toy {i}" for i in range(23)]
    pack_images(folder, list(pictures), names, [i % 3 for i in range(23)], names, ("a", "b", "c"), 32)
    return Images(folder)


def test_tables_are_those_of_a_plain_sort_over_all_images(tmp_path, store):
    net, size = tiny(), 4
    found = collect(tmp_path, net, store, size=size, batch=5)
    relevance = attribute(net, to_float(store.all()), store.labels, DEFAULT)
    share = relevance.sum((2, 3)) / relevance.sum((2, 3)).abs().sum(1, keepdim=True)
    with explained(net), taken(net, DEFAULT) as at:
        net(standardise(to_float(store.all())))
        loud = at[-1].detach().flatten(2)
    for c in range(relevance.shape[1]):
        best = sorted(range(23), key=lambda i: -share[i, c].item())[:size]
        assert found["relmax"]["image"][c].tolist() == best
        assert found["relmax"]["position"][c].tolist() == [relevance[i, c].flatten().argmax().item() for i in best]
        active = sorted(range(23), key=lambda i: -loud[i, c].max().item())[:size]
        assert found["actmax"]["image"][c].tolist() == active
        for k in range(3):
            own = sorted(range(k, 23, 3), key=lambda i: -share[i, c].item())[:size]
            assert found["by_class"][k]["image"][c].tolist() == own
    told = read_references(tmp_path, net)
    assert np.allclose(told["vectors"], relevance.sum((2, 3)), rtol=1e-3, atol=1e-7)
    assert np.allclose(told["logits"], net(standardise(to_float(store.all()))).detach(), rtol=1e-3, atol=1e-5)


def test_a_pass_that_was_killed_goes_on_and_ends_the_same(tmp_path, store, monkeypatch):
    net, real, calls = tiny(), references.add_batch, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    whole = collect(tmp_path / "whole", net, store, size=3, batch=5)
    monkeypatch.setattr(references, "add_batch", dies)
    monkeypatch.setattr(references, "code_key", lambda *objects: "code")
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "killed", net, store, size=3, batch=5, save_s=0)
    assert load_state(tmp_path / "killed" / "references.pt")["next"] == 15
    with pytest.raises(DataMissing, match="15 of 23"):
        read_references(tmp_path / "killed", net)
    again = collect(tmp_path / "killed", net, store, size=3, batch=5)
    assert len(calls) == 4 + 2 and again["next"] == 23
    for kind in ("relmax", "actmax"):
        assert all(torch.equal(again[kind][key], whole[kind][key]) for key in whole[kind])
    a, b = (np.load(tmp_path / name / "vectors.npy") for name in ("whole", "killed"))
    assert np.array_equal(a, b) and "forward" not in vars(net)


def test_references_of_another_network_are_refused(tmp_path, store):
    net, other = tiny(), tiny(1)
    with pytest.raises(DataMissing, match="not finished"):
        read_references(tmp_path, net)
    collect(tmp_path, net, store, size=2)
    read_references(tmp_path, tiny())
    for call in (lambda: read_references(tmp_path, other), lambda: collect(tmp_path, other, store, size=2)):
        with pytest.raises(RunMismatch, match="model"):
            call()
    nudged = tiny()
    nudged.features.norm5.running_mean[0] += 1e-6
    assert model_key(nudged) != model_key(net) == model_key(tiny())


def test_state_does_not_grow_with_the_images(store):
    sizes, net = [], tiny()
    state = {"made_by": {"layer": DEFAULT}, "next": 0, "relmax": {}, "actmax": {}, "by_class": []}
    count = lambda: sum(t.numel() for t in [*state["relmax"].values(), *state["actmax"].values(),
                                            *(t for table in state["by_class"] for t in table.values())])
    for _ in range(4):
        add_batch(state, net, to_float(store.batch(range(8))), store.labels[:8], 5)
        sizes.append(count())
    assert len(set(sizes)) == 1 and state["next"] == 32


def test_equal_values_keep_the_earlier_image():
    table = empty_table(1, 3)
    for first in (0, 4):
        table = merge(table, torch.ones(4, 1), torch.arange(first, first + 4), torch.zeros(4, 1, dtype=torch.long))
    assert table["image"].tolist() == [[0, 1, 2]]


def test_vectors_add_up_to_what_comes_through_the_layer():
    net, x = tiny().double(), torch.rand(2, 3, 32, 32, generator=rng(0, "x"), dtype=torch.float64) * 2 - 1
    vectors = concept_relevance(net, x, torch.tensor([0, 2]))
    there = attribute(net, x, torch.tensor([0, 2]), DEFAULT)
    assert torch.allclose(vectors[1, 3], there[1, 3].sum()) and torch.allclose(vectors.sum(1), there.sum((1, 2, 3)))
    assert torch.allclose(relative(vectors).abs().sum(1), torch.ones(2).double())
