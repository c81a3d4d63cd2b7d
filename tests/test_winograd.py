"Winograd's form of the 3x3 convolution against sums written out, in float64; and that wide layers take it, with all their derivatives."
import numpy as np
import pytest
import torch

from dermgan import convolution, winograd
from dermgan.layers import Conv, StyleConv


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def slid(x, weight):
    "A sum over the nine places of the filter."
    n, _, h, w = x.shape
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    return sum(np.einsum("nihw,oi->nohw", padded[:, :, r:r + h, c:c + w], weight.numpy()[:, :, r, c]) for r in range(3) for c in range(3))


def by_weight(x, gy):
    "For each place of the filter, the correlation of image and gradient."
    h, w = x.shape[2:]
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    return np.stack([np.stack([np.einsum("nohw,nihw->oi", gy.numpy(), padded[:, :, r:r + h, c:c + w]) for c in range(3)], -1) for r in range(3)], 2)


@pytest.mark.parametrize("portion", [1, 2**22])
@pytest.mark.parametrize("n, i, o, h, w", [(1, 1, 1, 4, 4), (3, 5, 2, 8, 12), (5, 2, 6, 16, 4)])
def test_output_and_gradients_equal_their_sums(monkeypatch, n, i, o, h, w, portion):
    monkeypatch.setattr(winograd, "PORTION", portion)
    x, weight, gy = draw(n, i, h, w), draw(o, i, 3, 3, seed=1), draw(n, o, h, w, seed=2)
    turned = weight.flip(2, 3).transpose(0, 1)
    assert np.abs(winograd.winograd(x, weight).numpy() - slid(x, weight)).max() < 1e-12
    assert np.abs(winograd.winograd(gy, weight, back=True).numpy() - slid(gy, turned)).max() < 1e-12
    assert np.abs(winograd.winograd_by_weight(x, gy).numpy() - by_weight(x, gy)).max() < 1e-12


@pytest.mark.parametrize("points", [(0.0, 1.0, -1.0), (0.0, 1.0, -1.0, 2.0, -2.0), (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)])
def test_every_set_of_points_slides_the_filter(points):
    at, g, bt = winograd.transforms(points)
    signal, taps = draw(len(points) + 1), draw(3, seed=1)
    wanted = np.correlate(signal.numpy(), taps.numpy(), "valid")
    assert np.abs((at @ ((g @ taps) * (bt @ signal))).numpy() - wanted).max() < 1e-10


def derivatives(layer, *inputs):
    "Output, gradients, and the gradients of the squared length of the gradient by the first input."
    parts = [t.clone().requires_grad_() for t in inputs]
    y = layer(*parts)
    wanted = [*parts, *layer.parameters()]
    (slope,) = torch.autograd.grad(y.pow(2).sum(), parts[0], create_graph=True)
    second = torch.autograd.grad(slope.square().sum(), wanted, allow_unused=True)
    first = torch.autograd.grad(layer(*parts).pow(2).sum(), wanted)
    return [y, *first, *(t for t in second if t is not None)]


@pytest.mark.parametrize("layer, shapes", [(Conv(3, 5, 3), [(2, 3, 8, 8)]), (StyleConv(3, 5, 4, 8), [(2, 3, 8, 8), (2, 4)])])
def test_layers_that_take_it_have_the_same_derivatives(monkeypatch, layer, shapes):
    taken, inputs = [], [draw(*shape, seed=k) for k, shape in enumerate(shapes)]
    layer = layer.double()
    if isinstance(layer, StyleConv):
        layer.noise_strength.data.fill_(0.3)
        inner = layer
        layer = torch.nn.Module()
        layer.inner, layer.forward = inner, lambda x, w: inner(x, w, "const")
    wanted = derivatives(layer, *inputs)

    def always(x, weight, how):
        taken.append(weight.shape[2:] == (3, 3) and how == ((1, 1), (1, 1), False, 1))
        return taken[-1]
    monkeypatch.setattr(convolution, "suits", always)
    found = derivatives(layer, *inputs)
    assert sum(taken) >= 6 and len(found) == len(wanted)
    assert max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(found, wanted)) < 1e-11


def test_a_wide_layer_in_float32_takes_it_and_rounds_a_little_more(monkeypatch):
    x, layer, called = draw(2, 192, 16, 16, dtype=torch.float32), Conv(192, 192, 3), []
    monkeypatch.setattr(convolution, "winograd", lambda *a, **more: called.append(1) or winograd.winograd(*a, **more))
    z = layer(x)
    exact = layer.double()(x.double())
    assert called == [1] and (z - exact).norm() / exact.norm() < 1e-5
