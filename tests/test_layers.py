"""StyleGAN2's layers against their formulas, restated one sample, one channel and one tap at a time (C1, C2, C3)."""
import math

import numpy as np
import pytest
import scipy.signal
import torch

from dermgan import layers
from dermgan.layers import Conv, Linear, StyleConv, ToRGB, convolve, downsample, fir, minibatch_std, modulated_conv, upsample

TAPS = np.array([1.0, 3.0, 3.0, 1.0])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def upfirdn(plane, up=1, down=1, pad=(0, 0), gain=1.0):
    "Insert zeros, pad, filter with [1, 3, 3, 1] / 8 along both axes, keep every `down`-th value."
    for axis in (0, 1):
        spread = np.zeros([n * up if i == axis else n for i, n in enumerate(plane.shape)])
        spread[(slice(None), slice(None, None, up)) if axis else slice(None, None, up)] = plane
        padded = np.pad(spread, [pad if i == axis else (0, 0) for i in (0, 1)])
        filtered = scipy.signal.upfirdn(TAPS / 8, padded, axis=axis)
        plane = filtered[(slice(None), slice(3, -3, down)) if axis else slice(3, -3, down)] * math.sqrt(gain)
    return plane


def each_plane(x, function):
    return np.stack([[function(plane) for plane in image] for image in x.numpy()])


@pytest.mark.parametrize("px", [2, 5, 8, 16])
def test_resampling_equals_upfirdn(px):
    x = draw(2, 3, px, px)
    assert np.abs(upsample(x).numpy() - each_plane(x, lambda p: upfirdn(p, up=2, pad=(2, 1), gain=4))).max() < 1e-12
    if px % 2 == 0:
        assert np.abs(downsample(x).numpy() - each_plane(x, lambda p: upfirdn(p, down=2, pad=(1, 1)))).max() < 1e-12
    assert np.abs(fir(x, padding=2).numpy() - each_plane(x, lambda p: upfirdn(p, pad=(2, 2)))).max() < 1e-12


def test_a_constant_keeps_its_value():
    ones = torch.ones(1, 2, 32, 32, dtype=torch.float64)
    assert (upsample(ones)[..., 3:-3, 3:-3] - 1).abs().max() < 1e-12
    assert (downsample(ones)[..., 2:-2, 2:-2] - 1).abs().max() < 1e-12


@pytest.mark.parametrize("function", [upsample, downsample, lambda x: fir(x, padding=2), lambda x: fir(x, padding=1, gain=4.0)])
def test_filters_have_exact_gradients_of_first_and_second_order(function):
    x = draw(1, 2, 6, 6).requires_grad_()
    assert torch.autograd.gradcheck(function, x) and torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("how", [dict(), dict(padding=(1, 1)), dict(stride=(2, 2)), dict(stride=(2, 2), padding=(1, 1), groups=2),
                                 dict(stride=(2, 2), transposed=True), dict(stride=(1, 2), padding=(0, 1), groups=2)])
def test_convolution_has_exact_gradients_of_first_and_second_order(how):
    x, w = draw(2, 4, 5, 5, seed=1).requires_grad_(), draw(4, 4 // how.get("groups", 1), 3, 3, seed=2).requires_grad_()
    apply = lambda x, w: convolve(x, w, **how)
    assert torch.autograd.gradcheck(apply, (x, w)) and torch.autograd.gradgradcheck(apply, (x, w), atol=1e-6)


def test_third_derivatives_are_pytorchs():
    results = []
    for conv in (lambda x, w: convolve(x, w, padding=(1, 1)), lambda x, w: torch.nn.functional.conv2d(x, w, padding=1)):
        x, w = draw(1, 2, 4, 4, seed=3).requires_grad_(), draw(2, 2, 3, 3, seed=4).requires_grad_()
        (first,) = torch.autograd.grad(conv(x, w).pow(4).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), w, create_graph=True)
        results.append(torch.autograd.grad(second.sum(), (x, w)))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*results))


def per_sample(image, weight, style, up):
    "Build this sample's own kernel and convolve tap by tap; up: zero insertion, then the filter with gain 4."
    kernel = weight * style[None, :, None, None]
    kernel = kernel / np.sqrt((kernel**2).sum((1, 2, 3), keepdims=True) + 1e-8)
    o, i, k, _ = kernel.shape
    h, w = image.shape[1:]
    if up:
        y = np.zeros((o, 2 * h + 1, 2 * w + 1))
        for a in range(k):
            for b in range(k):
                y[:, a:a + 2 * h:2, b:b + 2 * w:2] += np.einsum("oi,ihw->ohw", kernel[:, :, a, b], image)
        return np.stack([upfirdn(plane, pad=(1, 1), gain=4) for plane in y])
    return np.stack([sum(scipy.signal.correlate2d(image[c], kernel[f, c], "same") for c in range(i)) for f in range(o)])


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_modulated_convolution_equals_a_kernel_per_sample(up, seed):
    x, weight, style = draw(3, 5, 7, 7, seed=seed), draw(4, 5, 3, 3, seed=seed + 10), draw(3, 5, seed=seed + 20)
    expected = np.stack([per_sample(x[n].numpy(), weight.numpy(), style[n].numpy(), up) for n in range(3)])
    assert np.abs(modulated_conv(x, weight, style, up).numpy() - expected).max() < 1e-10


@pytest.mark.parametrize("up", [False, True])
def test_modulated_convolution_has_exact_gradients(up):
    inputs = [draw(2, 3, 4, 4).requires_grad_(), draw(2, 3, 3, 3, seed=1).requires_grad_(), draw(2, 3, seed=2).requires_grad_()]
    assert torch.autograd.gradcheck(lambda *a: modulated_conv(*a, up), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: modulated_conv(*a, up), inputs, atol=1e-5)


def test_demodulation_gives_unit_variance():
    x, weight = draw(64, 16, 8, 8), draw(32, 16, 3, 3, seed=1)
    y = modulated_conv(x, weight, 5 + 100 * draw(64, 16, seed=2).abs())
    assert 0.9 < y[:, :, 1:-1, 1:-1].std() < 1.1


def test_style_layer_adds_noise_before_bias_and_activation():
    layer = StyleConv(3, 4, 5, 8).double()
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = draw(*parameter.shape, seed=i) if parameter.ndim else torch.tensor(0.7, dtype=torch.float64)
    x, w = draw(2, 3, 8, 8, seed=8), draw(2, 5, seed=9)
    style = w.numpy() @ (layer.affine.weight.detach().numpy() / math.sqrt(5)).T + layer.affine.bias.detach().numpy()
    y = np.stack([per_sample(x[n].numpy(), layer.weight.detach().numpy(), style[n], False) for n in range(2)])
    y = y + 0.7 * layer.noise_const.numpy() + layer.bias.detach().numpy()[:, None, None]
    y = np.where(y > 0, y, 0.2 * y) * math.sqrt(2)
    assert np.abs(layer(x, w, "const").detach().numpy() - y).max() < 1e-10


def test_rgb_is_not_demodulated():
    layer = ToRGB(6, 5).double()
    x, w = draw(2, 6, 4, 4), draw(2, 5, seed=1)
    style = w.numpy() @ (layer.affine.weight.detach().numpy() / math.sqrt(5)).T + layer.affine.bias.detach().numpy()
    kernel = layer.weight.detach().numpy()[:, :, 0, 0]
    expected = np.einsum("oi,ni,nihw->nohw", kernel, style / math.sqrt(6), x.numpy())
    assert np.abs(layer(x, w).detach().numpy() - expected).max() < 1e-10


@pytest.mark.parametrize("kernel,down,plain", [(1, False, False), (3, False, False), (3, True, False), (1, True, True)])
def test_discriminator_convolution_equals_its_formula(kernel, down, plain):
    layer = Conv(3, 4, kernel, down, plain).double()
    if not plain:
        layer.bias.data = draw(4, seed=5)
    x = draw(2, 3, 8, 8, seed=6)
    weight = layer.weight.detach().numpy() / math.sqrt(3 * kernel**2)
    rows = []
    for image in x.numpy():
        if down:
            image = np.stack([upfirdn(p, down=2, pad=(1, 1)) if kernel == 1 else upfirdn(p, pad=(2, 2)) for p in image])
        mode = "valid" if down else "same"
        planes = [sum(scipy.signal.correlate2d(image[c], weight[f, c], mode) for c in range(3)) for f in range(4)]
        rows.append(np.stack(planes)[:, ::2 if down and kernel > 1 else 1, ::2 if down and kernel > 1 else 1])
    y = np.stack(rows)
    if not plain:
        y = y + layer.bias.detach().numpy()[:, None, None]
        y = np.where(y > 0, y, 0.2 * y) * math.sqrt(2)
    assert np.abs(layer(x, math.sqrt(0.5)).detach().numpy() - y * math.sqrt(0.5)).max() < 1e-10


@pytest.mark.parametrize("n,group", [(8, 4), (6, 3), (4, 4), (3, 4), (2, 4), (12, 4)])
def test_minibatch_deviation_equals_a_loop(n, group):
    x = draw(n, 5, 4, 4)
    size = min(group, n)
    expected = np.zeros(n)
    for member in range(n):
        others = [m for m in range(n) if m // size == member // size]
        expected[member] = np.sqrt(x[others].numpy().var(0) + 1e-8).mean()
    plane = minibatch_std(x, group)[:, 5]
    assert np.abs(plane.numpy() - expected[:, None, None]).max() < 1e-12
    with pytest.raises(ValueError, match="7 images"):
        minibatch_std(draw(7, 2, 4, 4), 4)


def test_the_multiplier_moves_weights_100_times_less():
    moved = {}
    for m in (1.0, 0.01):
        torch.manual_seed(0)
        layer = Linear(64, 64, lr_mul=m)
        before = (layer.weight * layer.gain).detach()
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
        layer(draw(32, 64).float()).square().sum().backward()
        optimizer.step()
        moved[m] = (layer.weight * layer.gain - before).abs().mean().item()
    assert abs(moved[1.0] / moved[0.01] / 100 - 1) < 0.01


def test_bfloat16_is_near_and_keeps_rgb_exact_in_type():
    layer, rgb = StyleConv(16, 16, 8, 16, up=True), ToRGB(16, 8)
    x, w = draw(2, 16, 8, 8).float(), draw(2, 8, seed=1).float()
    full, half = layer(x, w, "none"), layer(x.bfloat16(), w, "none")
    assert half.dtype == torch.bfloat16 and (half.float() - full).abs().max() < 0.05 * full.abs().max()
    assert rgb(half, w).dtype == torch.float32


def test_random_noise_follows_its_generator():
    device = torch.device("cpu")
    draws = [layers.random_normal((3, 4), torch.Generator().manual_seed(s), device) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_noise_of_several_generators_is_the_noise_of_each():
    device, seeds = torch.device("cpu"), (3, 1, 2)
    together = layers.random_normal((6, 1, 5, 5), [torch.Generator().manual_seed(s) for s in seeds], device)
    alone = [torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(s)) for s in seeds]
    assert torch.equal(together, torch.cat(alone))
    with pytest.raises(RuntimeError):
        layers.random_normal((7, 5), [torch.Generator(), torch.Generator()], device)
