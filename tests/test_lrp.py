"""Relevance: rules as matrices in float64, what is kept and lost, networks left as they were."""
import gc

import numpy as np
import pytest
import torch
from torch import nn
from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, Norm, Pass, ZPlus

from dermgan.allot import standardise
from dermgan.classify import SHAPES, build
from dermgan.core import ConfigError, NotFinite, import_torchvision, rng
from dermgan.lrp import (PaddedConv, Threshold, attribute, canonized, composite, explained, fold_right, layer_names,
                         rank_correlation, scale_and_shift, tap)


def images(count=2, side=32, name="images"):
    return torch.rand(count, 3, side, side, generator=rng(0, name), dtype=torch.float64) * 2 - 1


def shaken(net, name="statistics"):
    "Give a network statistics, scales (some negative, one zero) and shifts that a fresh one does not have."
    draw = rng(0, name)
    for part in net.double().modules():
        if isinstance(part, nn.BatchNorm2d):
            noise = lambda: torch.randn(part.num_features, generator=draw, dtype=torch.float64)
            part.running_mean.copy_(0.3 * noise())
            part.running_var.copy_(0.5 + noise().abs())
            part.weight.data.copy_(0.7 + 0.5 * noise())
            part.weight.data[0] = 0
            part.bias.data.copy_(0.3 * noise())
    return net.eval()


def tiny(classes=3):
    "The smallest network of the class: one layer a block."
    torch.manual_seed(0)
    return shaken(import_torchvision().models.DenseNet(4, (1, 1, 1, 1), 8, num_classes=classes))


def hooks(net):
    return sum(len(d) for part in net.modules() for d in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("arch", sorted(SHAPES))
def test_canonical_form_says_the_same_and_leaves_every_bit(arch, padded):
    net, x = shaken(build(arch)), standardise(images())
    net.train(), net.features.denseblock1.eval()
    modes, state = [p.training for p in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    places = [(name, id(part)) for name, part in net.named_modules()]
    with torch.no_grad():
        expected = build(arch).double().eval()
        expected.load_state_dict(state)
        with pytest.raises(KeyboardInterrupt), canonized(net, padded):
            assert (net(x) - expected(x)).abs().max() < 1e-10 * expected(x).abs().max().clamp(min=1)
            assert not any(isinstance(p, nn.BatchNorm2d) for p in net.modules())
            raise KeyboardInterrupt
    assert [(name, id(part)) for name, part in net.named_modules()] == places
    assert [p.training for p in net.modules()] == modes and hooks(net) == 0 and "forward" not in vars(net)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_zero_padding_makes_the_bias_depend_on_the_place():
    torch.manual_seed(0)
    norm, conv = nn.BatchNorm2d(2).double().eval(), nn.Conv2d(2, 1, 3, padding=1).double()
    norm.bias.data[:] = torch.tensor([0.5, -0.25])
    threshold, folded = fold_right(norm, conv)
    folded(threshold(torch.zeros(1, 2, 4, 5, dtype=torch.float64)))
    shift, w = scale_and_shift(norm)[1], conv.weight.detach()[0]
    expected = torch.empty(4, 5, dtype=torch.float64)
    for row in range(4):
        for column in range(5):
            inside = [(c, i, j) for c in range(2) for i in range(3) for j in range(3)
                      if 0 <= row + i - 1 < 4 and 0 <= column + j - 1 < 5]
            expected[row, column] = conv.bias.item() + sum(w[c, i, j] * shift[c] for c, i, j in inside)
    assert torch.allclose(folded.bias[0], expected, atol=1e-14) and isinstance(folded, PaddedConv)


def matrix(layer, shape):
    units = torch.eye(int(np.prod(shape)), dtype=torch.float64).view(-1, *shape)
    bias = layer(torch.zeros(1, *shape, dtype=torch.float64)).flatten().detach()
    return layer(units).flatten(1).detach() - bias, bias


def kept_sign(z, epsilon):
    return z + epsilon * torch.where(z >= 0, 1.0, -1.0)


def stated(rule, x, w, b, r):
    "The published formulas over a whole matrix, with the library's stabiliser of 1e-6."
    up, down = lambda t: t.clamp(min=0), lambda t: t.clamp(max=0)
    z = x @ w + b
    if rule == "epsilon":
        return x * (w @ (r / kept_sign(z, 1e-6)))
    if rule == "gamma":
        v, c = w + 0.25 * up(w), b + 0.25 * up(b)
        return x * (v @ (r / kept_sign(x @ v + c, 1e-6)))
    helps = up(x)[:, None] * up(w) + down(x)[:, None] * down(w)
    harms = up(x)[:, None] * down(w) + down(x)[:, None] * up(w)
    good = helps @ (r / kept_sign(helps.sum(0) + up(b), 1e-6))
    if rule == "zplus":
        return good
    return 2 * good - harms @ (r / kept_sign(harms.sum(0) + down(b), 1e-6))


LAYERS = {"conv": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 5, 5)),
          "pointwise": (lambda: nn.Conv2d(3, 4, 1), (3, 3, 3)), "linear": (lambda: nn.Linear(7, 4), (7,))}
RULES = {"epsilon": Epsilon(), "gamma": Gamma(), "zplus": ZPlus(), "alpha2beta1": AlphaBeta()}


def handed(layer, rule, x, r):
    hook = rule.copy()
    handle, x = hook.register(layer), x.clone().requires_grad_()
    out = torch.autograd.grad(layer(x), x, r)[0]
    handle.remove()
    return out


@pytest.mark.parametrize("kind", sorted(LAYERS))
@pytest.mark.parametrize("rule", sorted(RULES))
def test_each_rule_is_its_formula(kind, rule):
    make, shape = LAYERS[kind]
    for case in range(3):
        torch.manual_seed(case)
        layer, x = make().double().requires_grad_(False), torch.randn(1, *shape, dtype=torch.float64)
        r = torch.randn_like(layer(x))
        w, b = matrix(layer, shape)
        expected = stated(rule, x.flatten(), w, b, r.flatten())
        assert torch.allclose(handed(layer, RULES[rule], x, r).flatten(), expected, rtol=1e-9, atol=1e-12)


def test_flat_norm_and_pass_are_their_formulas():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(2, 3, 3, padding=1).double().requires_grad_(False), torch.randn(1, 2, 4, 4, dtype=torch.float64)
    r = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    reach = (matrix(conv, (2, 4, 4))[0] != 0).double()
    assert torch.allclose(handed(conv, Flat(), x, r).flatten(), reach @ (r.flatten() / (reach.sum(0) + 1e-6)), rtol=1e-10)
    pool, half = nn.AvgPool2d(2), torch.randn(1, 2, 2, 2, dtype=torch.float64)
    w = matrix(pool, (2, 4, 4))[0]
    expected = x.flatten() * (w @ (half.flatten() / kept_sign(x.flatten() @ w, 1e-6)))
    assert torch.allclose(handed(pool, Norm(), x, half).flatten(), expected, rtol=1e-10)
    threshold = Threshold(torch.tensor([2.0, -1]).double(), torch.tensor([0.1, 0.2]).double())
    assert torch.equal(handed(threshold, Pass(), x, x), x)


def test_another_rule_stands_in_for_one_kind_of_layer():
    net, x, targets = tiny(), images(1), torch.tensor([0])
    plain, gamma = (attribute(net, x, targets, rules=rules) for rules in (None, composite(convolution=Gamma(0.1))))
    again = attribute(net, x, targets, rules=composite(Flat(), ZPlus(), Epsilon(), Norm()))
    assert torch.equal(plain, again) and not torch.allclose(plain, gamma)


def test_the_last_block_and_the_folded_biases_add_up_to_the_logit():
    net, x = tiny(), images(3)
    targets, e = torch.tensor([0, 1, 2]), 1e-6
    with torch.no_grad():
        features = net.features[:-1](standardise(x))
        scale, shift = scale_and_shift(net.features.norm5)
        floor = torch.where(scale == 0, torch.zeros(()).double(), -shift / scale)[:, None, None]
        means = torch.where(scale[:, None, None] * features + shift[:, None, None] > 0, features, floor).mean((2, 3))
        logits = net(standardise(x))[range(3), targets]
        shares = means * net.classifier.weight[targets] * scale * (logits / kept_sign(logits, e))[:, None]
        arrives = (shares * means / kept_sign(means, e)).sum(1)
        constant = torch.where(scale == 0, shift.clamp(min=0), shift)
        bias = net.classifier.bias[targets] + net.classifier.weight[targets] @ constant
        share = (bias + e * logits.sign()) / kept_sign(logits, e) * logits
        lost = (shares * (1 - means / kept_sign(means, e))).sum(1)
    relevance = attribute(net, x, targets, "features.denseblock4").sum((1, 2, 3))
    assert torch.allclose(relevance, arrives, rtol=1e-10)
    assert torch.allclose(relevance + share + lost, logits, rtol=1e-10) and (lost.abs() < 1e-2 * logits.abs()).all()


def test_the_image_gets_what_the_first_convolution_has_and_a_batch_is_its_images():
    net, x, targets = tiny(), images(3), torch.tensor([2, 0, 1])
    whole = attribute(net, x, targets)
    stem = attribute(net, x, targets, "features.conv0")
    assert torch.allclose(whole.sum((1, 2, 3)), stem.sum((1, 2, 3)), rtol=1e-4)
    alone = torch.cat([attribute(net, x[i:i + 1], targets[i:i + 1]) for i in range(3)])
    assert torch.allclose(whole, alone, rtol=1e-8, atol=1e-14)
    with torch.no_grad():
        assert torch.equal(attribute(net, x, targets), whole)
    single = attribute(net.float(), x.float(), targets)
    assert single.dtype == torch.float32 and torch.allclose(single.double(), whole, rtol=0.02, atol=1e-3 * whole.abs().max())


def test_a_strange_layer_is_named_and_nothing_touched():
    resnet = import_torchvision().models.resnet18()
    net = tiny()
    net.features.denseblock2.denselayer1.relu1 = nn.SiLU()
    for strange, said in ((resnet, "ResNet"), (net, "features.denseblock2.denselayer1.relu1 is SiLU"),
                          (tiny().half(), "float16")):
        state, parts = {k: v.clone() for k, v in strange.state_dict().items()}, list(strange.modules())
        with pytest.raises(ConfigError, match=said):
            attribute(strange, images(1), torch.tensor([0]))
        assert all(torch.equal(v, state[k]) for k, v in strange.state_dict().items())
        assert [id(p) for p in strange.modules()] == [id(p) for p in parts] and hooks(strange) == 0
    bare = tiny()
    bare.features.norm5 = nn.BatchNorm2d(bare.features.norm5.num_features, affine=False)
    with pytest.raises(ConfigError, match="norm5 has no scale"):
        attribute(bare, images(1), torch.tensor([0]))


def test_an_unknown_layer_lists_those_that_exist():
    net = tiny()
    with pytest.raises(ConfigError, match="features.transition2"):
        attribute(net, images(1), torch.tensor([0]), "features.transition9")
    assert hooks(net) == 0 and len(layer_names(build("densenet121"))) == 2 + 58 + 4 + 3
    widths = {arch: tap(build(arch), "features.transition3").out_channels for arch in ("densenet121", "densenet169")}
    assert widths == {"densenet121": 512, "densenet169": 640}


def test_relevance_that_is_no_number_is_refused_and_the_network_left_alone():
    net, x = tiny(), images(3)
    x[1, 0, 0, 0] = float("nan")
    with pytest.raises(NotFinite, match=r"\[1\], of 3"):
        attribute(net, x, torch.tensor([0, 1, 2]))
    assert hooks(net) == 0 and "forward" not in vars(net)
    net.classifier.weight.data[0] = float("inf")
    with pytest.raises(NotFinite):
        attribute(net, images(1), torch.tensor([0]))


def test_a_thousand_attributions_leave_hooks_and_memory_as_they_were():
    net, x, target = tiny().float(), images(1).float(), torch.tensor([1])
    alive = lambda: (gc.collect(), sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))[1]
    attribute(net, x, target)
    before, parts = alive(), sum(1 for _ in net.modules())
    for _ in range(1000):
        attribute(net, x, target, "features.transition3")
    assert alive() == before and hooks(net) == 0 and sum(1 for _ in net.modules()) == parts


def test_an_exception_within_leaves_no_hook():
    net = tiny()
    with pytest.raises(RuntimeError), explained(net):
        assert hooks(net) > 0
        net(torch.zeros(1, 2, 32, 32, dtype=torch.float64))
    assert hooks(net) == 0 and isinstance(net.features.norm5, nn.BatchNorm2d)


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr
    a, b = (torch.randn(3, 5, 6, generator=rng(0, name)) for name in "ab")
    expected = [spearmanr(p.flatten(), q.flatten())[0] for p, q in zip(a, b)]
    assert np.allclose(rank_correlation(a, b), expected)
