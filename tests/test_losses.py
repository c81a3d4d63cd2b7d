"""Losses and regularisers against finite differences; compiled forms equal to eager ones; a compiler that fails costs nothing."""
import warnings
from dataclasses import replace

import pytest
import torch

from dermgan import gan
from dermgan.ada import PIPES, augment_images
from dermgan.core import ConfigError, read_profile, resolve_run, rng
from dermgan.layers import random_normal
from dermgan.losses import Forms, path_lengths, r1_penalty
from dermgan.stylegan2 import Discriminator, Generator, draw_noise

TINY = replace(read_profile("smoke"), image_px=8, z_dim=8, w_dim=8, channel_base=64, channel_max=8, mapping_layers=2, gan_batch=8,
               gan_pl_weight=2.0, gan_pl_every=2, gan_r1_every=2, precision="fp32")


@pytest.fixture(autouse=True)
def forgotten():
    "What a test compiled is no other test's."
    yield
    torch._dynamo.reset()


@pytest.fixture
def nets():
    "A generator and a discriminator in float64, with biases and noise that are not zero."
    torch.manual_seed(0)
    g, d = Generator(8, 8, 8, 64, 8, 2).double(), Discriminator(8, 64, 8).double()
    for name, q in [*g.named_parameters(), *d.named_parameters()]:
        if name.endswith(("bias", "noise_strength")):
            q.data.add_(torch.randn(q.shape, dtype=q.dtype), alpha=0.3)
    return g, d


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def images(count=4, px=8):
    return torch.randn(count, 3, px, px, generator=rng(3), dtype=torch.float64)


def along(loss, q, direction, h=1e-5):
    "The derivative of a loss as one weight moves along a direction, by central differences."
    here, values = q.detach().clone(), []
    for sign in (1, -1, 0):
        q.data.copy_(here + sign * h * direction)
        values.append(loss().detach())
    return (values[0] - values[1]) / (2 * h)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_the_regularisers_follow_finite_differences(nets, backend):
    (g, d), x = nets, images()
    forms = Forms(backend is not None, backend)
    ws = torch.randn(4, g.num_ws, 8, generator=rng(4), dtype=torch.float64, requires_grad=True)

    @torch.no_grad()
    def r1_by_hand():
        total, steps = 0.0, 1e-5 * torch.eye(192, dtype=torch.float64).view(192, 3, 8, 8)
        for i in range(4):
            moved = [x.expand(192, -1, -1, -1, -1).clone() for _ in range(2)]
            moved[0][:, i] += steps
            moved[1][:, i] -= steps
            up, down = (d(groups.flatten(0, 1)).view(192, 4).sum(1) for groups in moved)
            total += ((up - down) / 2e-5).square().sum()
        return (total / 8).item()

    assert r1_by_hand() == pytest.approx(forms.r1(d, lambda x: x, x, 1.0).item(), rel=1e-6)

    draw = rng(9)
    value = lambda: forms.lengths(g.synthesis, ws, rng(9)).mean()
    planes = draw_noise(g.synthesis, 4, draw)
    noise = random_normal((4, 3, 8, 8), draw, ws.device) / 8

    def length_by_hand():
        total = torch.zeros(4, g.num_ws, 8, dtype=torch.float64)
        for layer in range(g.num_ws):
            for k in range(8):
                e = torch.zeros_like(ws)
                e[:, layer, k] = 1e-5
                with torch.no_grad():
                    total[:, layer, k] = ((g.synthesis(ws + e, planes) - g.synthesis(ws - e, planes)) * noise).sum((1, 2, 3)) / 2e-5
        return total.square().sum(2).mean(1).sqrt().mean().item()

    assert length_by_hand() == pytest.approx(value().item(), rel=1e-6)
    for loss, q in ((lambda: forms.r1(d, lambda x: x, x, 1.0), d.b8.conv0.weight), (lambda: forms.r1(d, lambda x: x, x, 1.0), d.b4.fc.weight),
                    (value, g.synthesis.b8.conv0.weight), (value, g.synthesis.b8.conv1.affine.weight)):
        (by_weight,) = torch.autograd.grad(loss(), q)
        direction = torch.randn(q.shape, generator=rng(6), dtype=q.dtype)
        if backend is None:
            assert (by_weight * direction).sum().item() == pytest.approx(along(loss, q, direction).item(), rel=1e-4)
        assert by_weight.abs().sum() > 0
    assert forms.compiled == (backend is not None)


def train(p, steps=4, forms=None):
    "A few steps on noise; the training and its logs."
    pool = torch.randint(0, 256, (24, 3, 8, 8), generator=rng(0, "pool")).to(torch.uint8)
    toy = type("Pool", (list,), {"batch": staticmethod(lambda indices: pool[indices])})(range(24))
    t, logs = gan.begin(p, 0, "fp32"), []
    t.forms = forms or t.forms
    for _ in range(steps):
        logs.append(gan.train_step(t, p, toy, seed=0))
    return t, logs


def weights(t):
    return [q for name in ("g", "d", "ema") for q in getattr(t, name).state_dict().values()] + [t.pl_mean]


@pytest.mark.parametrize("changes", [{}, {"gan_accumulate": 2, "gan_aug": "geometry+mild", "gan_aug_p": 0.5}])
def test_a_training_is_the_same_compiled(float64, changes):
    p = replace(TINY, **changes)
    (eager, said), (compiled, told) = train(p), train(p, forms=Forms(True, "aot_eager"))
    assert not eager.forms.compiled and compiled.forms.compiled and len(compiled.forms.made) == 2
    assert {"r1", "path_length"} <= set(told[0]) and set(said[1]) == set(told[1])
    for a, b in zip(weights(eager), weights(compiled)):
        assert (a - b).abs().max() <= 1e-9 * max(1.0, a.abs().max())


def test_inductor_compiles_a_gradient_of_a_gradient():
    torch.manual_seed(0)
    d, x, forms, values = Discriminator(8, 32, 4), images().float(), Forms(True), []
    for form in (forms, Forms()):
        penalty = form.r1(d, lambda x: x, x, 1.0)
        values.append([penalty, *torch.autograd.grad(penalty, d.parameters(), materialize_grads=True, allow_unused=True)])
    assert forms.compiled and all((a - b).norm() <= 1e-4 * b.norm() + 1e-7 for a, b in zip(*values))


@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_compiler_that_fails_costs_a_warning_and_nothing_else(after):
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        if len(calls) > after:
            raise RuntimeError("no kernel for this card\nand a long story")
        return graph

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        failed, logs = train(TINY, forms=Forms(True, backend))
    said = [str(w.message) for w in said if "could not be compiled" in str(w.message)]
    whole, expected = train(TINY)
    used = len(calls) > after
    assert len(said) == used and failed.forms.compiled != used
    assert not said or "(no kernel for this card)" in said[0] and "gan_compile=off" in said[0] and "long story" not in said[0]
    assert len(logs) == len(expected) == 4
    for a, b in zip(weights(failed), weights(whole)):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5) and (after or torch.equal(a, b))


def test_running_out_of_memory_is_no_failure_of_the_compiler(nets):
    def backend(graph, inputs):
        return lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))

    forms = Forms(True, backend)
    with pytest.raises(torch.OutOfMemoryError):
        forms.logits(nets[1], images())
    assert forms.compiled


def test_r1_is_by_the_image_before_the_pipe(nets):
    d, x = nets[1], images()
    pipe = lambda images: augment_images(images, 0.9, PIPES["geometry+mild"], rng(15))
    whole = r1_penalty(lambda images: d(pipe(images)), x, 1.0)
    parts = Forms().r1(d, pipe, x, 1.0)
    assert torch.allclose(whole, parts, rtol=1e-12) and not torch.allclose(parts, Forms().r1(d, lambda x: x, x, 1.0), rtol=1e-3)
    for a, b in zip(*(torch.autograd.grad(loss, d.parameters(), materialize_grads=True, allow_unused=True) for loss in (whole, parts))):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_linear_map_has_the_lengths_of_its_rows():
    mixer = torch.randn(6, 48, generator=rng(1), dtype=torch.float64)
    ws = torch.zeros(2, 2, 6, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, 3, 4, 4, generator=rng(2), dtype=torch.float64)
    found = path_lengths(lambda w: (w[:, 0] @ mixer + 2 * w[:, 1] @ mixer).view(-1, 3, 4, 4), ws, noise)
    row = (noise.view(2, 48) / 4 @ mixer.T).square().sum(1)
    assert torch.allclose(found, ((row + 4 * row) / 2).sqrt(), rtol=1e-12)


def test_noise_drawn_before_is_the_noise_drawn_within(nets):
    net, ws = nets[0].synthesis, torch.randn(4, nets[0].num_ws, 8, dtype=torch.float64)
    gens = lambda: [rng(1, k) for k in range(2)]
    before, within = net(ws, draw_noise(net, 4, gens())), net(ws, "random", gens())
    assert torch.equal(before, within) and not torch.equal(before, net(ws, "none"))
    assert [tuple(plane.shape) for plane in draw_noise(net, 4, gens())] == [(4, 1, 4, 4), (4, 1, 8, 8), (4, 1, 8, 8)]


def test_compiling_is_how_and_not_what(tmp_path):
    plain, compiled = (resolve_run("smoke", 0, more, root=tmp_path) for more in ({}, {"gan_compile": "on"}))
    assert plain.folder == compiled.folder and compiled.profile.gan_compile == "on"
    assert gan.begin(replace(TINY, gan_compile="on"), 0, "fp32").forms.compiled and not gan.begin(TINY, 0, "fp32").forms.compiled
    assert gan.made_by(plain) == gan.made_by(compiled)
    with pytest.raises(ConfigError, match="gan_compile"):
        read_profile("smoke", {"gan_compile": "perhaps"})


def test_a_gpu_without_bf16_trains_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert gan.pick_precision(replace(TINY, precision="auto"), "cuda") == ("fp32", {})
    with pytest.raises(ConfigError, match="bfloat16(.|\n)*precision=fp32"):
        gan.pick_precision(replace(TINY, precision="bf16"), "cuda")
