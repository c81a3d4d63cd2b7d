"""The page of concepts: controls that call what they change, and errors said in a sentence."""
import ipywidgets as w
import torch

from dermgan.allot import standardise
from dermgan.browse import Network, concept_html, make_controls, patches_html, ranked, watch, whole_html
from dermgan.core import DataMissing
from dermgan.references import DEFAULT, collect, concept_relevance
from dermgan.store import to_float
from test_references import store, tiny  # noqa: F401


def test_every_concept_is_listed_by_its_share():
    net, image = tiny(), torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vector = concept_relevance(net, image[None], torch.tensor([1]))[0]
    order = ranked(net, image, 1)
    assert [c for c, _ in order] == sorted(range(len(vector)), key=lambda c: -vector[c].item())


def test_an_image_a_class_and_a_concept_become_pictures_with_words(tmp_path, store):  # noqa: F811
    net = tiny()
    network = Network(net, collect(tmp_path, net, store, size=3), {2: "<b>"})
    pixels = store.batch([0])[0]
    drawn, target, order = whole_html(network, pixels, "toy 0", ["a", "b", "c"], None)
    assert target == int(net(standardise(to_float(pixels)[None])).argmax())
    assert drawn.count("<img") == drawn.count("<figcaption") == 2
    heat, patches = concept_html(network, pixels, target, 2, store, 3)
    assert "&lt;b&gt;" in heat and "<b>" not in heat + patches and patches.count("<img") == 3
    assert patches_html([], "nothing").count("<img") == 0


def test_a_change_calls_once_and_an_error_is_said():
    c, out, seen = make_controls([("x", "x")], ["val"], ["a", "b"]), {"status": w.HTML()}, []

    def fill():
        seen.append("fill")
        c["concept"].options = [("one", 1), ("two", 2)]

    def fail():
        raise DataMissing("There is no such image.", "val holds no <b>.", "Choose another.")

    guarded = watch(c, out, {"target": fill, "concept": lambda: seen.append("concept"), "truth": fail})
    c["target"].value = 1
    assert seen == ["fill"]
    c["concept"].value = 2
    assert seen == ["fill", "concept"]
    c["truth"].value = 1
    assert "no &lt;b&gt;" in out["status"].value and 'role="status"' in out["status"].value
    guarded(fill)
    assert "no such" not in out["status"].value
