"""The hypernetwork against generators whose weights are set by hand, the affine sum, exact resume, refusals, four inversions."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from dermgan import compare, core, factorize, hyperstyle, hypertrain
from dermgan.compare import agreement, edit_effects, outliers, slopes, stripes
from dermgan.core import ConfigError, DataMissing, DataRefused, RunMismatch, load_state, resolve_run, rng, save_weights
from dermgan.encode import open_encoder, train_encoder
from dermgan.factorize import Transformation, draw_codes
from dermgan.hypernet import HyperNet, Offsets, refine, refinements, render_tuned, synthesize_tuned, tuned_layers
from dermgan.hyperstyle import (Nets, Tuning, draw_pivot, invert, load_inverted, render, save_inverted, tune_pivot)
from dermgan.hypertrain import (Frozen, Losses, begin_hyper, hyper_step, load_hyperstyle, open_hyperstyle, reconstruction_loss,
                                start_codes, target_features, train_hyperstyle)
from dermgan.phantom import pack_phantom
from dermgan.stylegan2 import Generator, save_generator

SMALL = tuned_layers(16, 128, 16, 16)


def generator(dtype=torch.float32):
    torch.manual_seed(0)
    g = Generator(16, z_dim=8, w_dim=8, channel_base=128, channel_max=16, mapping_layers=2).to(dtype).eval().requires_grad_(False)
    for px in g.synthesis.px:
        g.synthesis.get_submodule(f"b{px}.torgb").weight.mul_(0.2)
    for name in SMALL:
        g.synthesis.get_submodule(name).noise_strength.fill_(0.1)
    g.mapping.w_avg.copy_(g.mapping(torch.randn(512, 8, generator=rng(0, "w")).to(dtype)).mean(0))
    return g


def lively(dtype=torch.float32, seed=0):
    "A hypernetwork whose every tensor is random, so that nothing is zero by its start."
    torch.manual_seed(seed)
    hyper = HyperNet(16, 128, 16, width=4, units=(1, 1, 1, 1), code=6, wide_from=16).to(dtype)
    for value in hyper.parameters():
        value.data.add_(0.1 * torch.randn(value.shape, generator=rng(seed, *value.shape)).to(dtype))
    return hyper.eval().requires_grad_(False)


class Mean(nn.Module):
    "An encoder that answers the mean code, moved by the image's brightness."

    def __init__(self, g):
        super().__init__()
        self.num_ws = g.num_ws
        self.register_buffer("w", g.w_avg.clone())

    def forward(self, images):
        shift = images.mean((1, 2, 3))[:, None, None] * torch.linspace(0, 1, self.num_ws).to(images)[:, None]
        return self.w.to(images) + shift


@pytest.mark.parametrize("px,base,most", [(32, 32768, 512), (64, 4096, 128), (64, 1024, 64), (128, 2048, 32), (1024, 32768, 512)])
def test_the_tables_agree_with_the_generator_at_every_size(px, base, most):
    with torch.device("meta"):
        g = Generator(px, 8, 8, base, most, 1)
    real = {n: (m.weight.shape[0], m.weight.shape[1]) for n, m in g.synthesis.named_modules()
            if n.split(".")[-1] in ("conv0", "conv1")}
    widest = max(o for o, _ in real.values())
    for wide_from in (1, 64, 512):
        table = tuned_layers(px, base, most, wide_from)
        assert {n: row[:2] for n, row in table.items()} == real
        assert all(wide == (o == i == widest and o >= wide_from) for o, i, wide in table.values())
    assert not any("torgb" in n for n in table)


@pytest.mark.parametrize("px,printed", [(256, 313.0), (512, 325.2), (1024, 332.7)])
def test_the_full_network_has_the_published_number_of_parameters(px, printed):
    with torch.device("meta"):
        count = sum(q.numel() for q in HyperNet(px, 32768, 512).parameters()) / 1e6
    assert abs(count - printed) < 0.15


@pytest.mark.parametrize("px", [8, 32, 64, 512])
def test_one_code_a_layer_at_every_size(px):
    hyper = HyperNet(px, 256, 16, width=2, units=(1, 1, 1, 1), code=4, wide_from=16)
    codes = hyper(torch.zeros(1, 3, px, px), torch.zeros(1, 3, px, px))
    assert codes.shape == (1, len(tuned_layers(px, 256, 16)), 5) and (codes[..., -1] == 1).all()


def test_summed_codes_give_the_sum_of_the_offsets_and_the_formula_by_hand():
    offsets = Offsets(SMALL, 6).double()
    for value in offsets.parameters():
        value.data.normal_(generator=rng(0, *value.shape))
    codes = torch.cat([torch.randn(5, 3, 5, 6, generator=rng(0, "z"), dtype=torch.float64), torch.ones(5, 3, 5, 1).double()], 3)
    parts, whole = [offsets(z) for z in codes], offsets(codes.sum(0))
    w2, b2, w1, b1 = (getattr(offsets, name).detach().numpy() for name in ("w2", "b2", "w1", "b1"))
    for i, (name, (o, n_in, wide)) in enumerate(SMALL.items()):
        total = sum(part[name] for part in parts)
        assert (whole[name] - total).abs().max() < 1e-10 * total.abs().max()
        z = codes[0, 1, i, :6].numpy()
        if wide:
            by_hand = ((z @ w2 + b2).reshape(o, 6) @ w1 + b1).reshape(o, n_in, 3, 3)
        else:
            own = offsets.narrow[name.replace(".", "_")]
            by_hand = (z @ own.weight.detach().numpy() + own.bias.detach().numpy()).reshape(o, n_in, 1, 1)
        assert np.allclose(parts[0][name][1].detach().numpy(), by_hand, atol=1e-12)


def test_per_image_weights_equal_generators_whose_weights_are_set():
    g, hyper = generator(torch.float64), lively(torch.float64)
    ws, images = draw_codes(g, 3, 1), torch.rand(3, 3, 16, 16, generator=rng(0, "x"), dtype=torch.float64) * 2 - 1
    codes = refine(hyper, g, images, ws, 2)
    offsets = hyper.offsets(codes)
    drawn = synthesize_tuned(g.synthesis, ws, offsets)
    for n in range(3):
        alone = generator(torch.float64)
        for name in SMALL:
            alone.synthesis.get_submodule(name).weight.mul_(1 + offsets[name][n])
        assert (alone.synthesis(ws[n:n + 1], "const") - drawn[n:n + 1]).abs().max() < 1e-10
    assert (drawn - g.synthesis(ws, "const")).abs().max() > 1e-3


def test_zero_offsets_are_the_encoders_image_exactly():
    g, ws = generator(), draw_codes(generator(), 4, 2)
    torch.manual_seed(0)
    fresh = HyperNet(16, 128, 16, 4, (1, 1, 1, 1), 6, 16).eval()
    codes = refine(fresh, g, factorize.render(g, ws).flip(3), ws, 3)
    assert codes.any() and torch.equal(render_tuned(fresh, g, ws, codes), factorize.render(g, ws))
    assert torch.equal(render_tuned(lively(), g, ws, lively().nothing(4)), factorize.render(g, ws))
    double = generator(torch.float64)
    zeros = {name: torch.zeros(4, o, i, 1, 1).double() for name, (o, i, _) in SMALL.items()}
    assert (synthesize_tuned(double.synthesis, ws.double(), zeros) - double.synthesis(ws.double(), "const")).abs().max() < 1e-12


def test_refinement_restated_and_its_state_carries_no_gradient():
    g, hyper = generator(torch.float64), lively(torch.float64).requires_grad_(True)
    images, ws = torch.rand(2, 3, 16, 16, generator=rng(1, "x"), dtype=torch.float64) * 2 - 1, draw_codes(generator(torch.float64), 2, 3)
    codes, drawn = torch.zeros(2, 5, 7).double(), g.synthesis(ws, "const")
    for step, (found, seen) in enumerate(refinements(hyper, g, images, ws, 3)):
        before = codes
        codes = before + hyper(images, drawn.clamp(-1, 1)).detach()
        drawn = synthesize_tuned(g.synthesis, ws, hyper.offsets(codes)).detach()
        assert torch.allclose(found, codes) and torch.allclose(seen, drawn)
        hyper.zero_grad()
        seen.sum().backward()
        got = hyper.trunk[0].weight.grad.clone()
        hyper.zero_grad()
        last = before + hyper(images, before_image.clamp(-1, 1)) if step else hyper(images, g.synthesis(ws, "const").clamp(-1, 1))
        synthesize_tuned(g.synthesis, ws, hyper.offsets(last)).sum().backward()
        assert torch.allclose(got, hyper.trunk[0].weight.grad)
        before_image = drawn
    assert torch.allclose(refine(hyper, g, images, ws, 3), codes) and (codes[..., -1] == 3).all()


def test_an_image_does_not_see_which_others_share_its_batch():
    g, hyper = generator(torch.float64), lively(torch.float64)
    images, ws = torch.rand(5, 3, 16, 16, generator=rng(2, "x"), dtype=torch.float64) * 2 - 1, draw_codes(generator(torch.float64), 5, 3)
    whole = refine(hyper, g, images, ws, 2)
    assert (refine(hyper, g, images, ws, 2, batch_images=2) - whole).abs().max() < 1e-10
    assert (render_tuned(hyper, g, ws, whole, 2) - render_tuned(hyper, g, ws, whole)).abs().max() < 1e-6


def colour():
    return SimpleNamespace(features=lambda x: [x.mean((2, 3))], distance=lambda a, b: (a[0] - b[0]).square().sum(1), name="colour")


@pytest.mark.parametrize("l2", [0.0, 1.0])
@pytest.mark.parametrize("perceptual", [0.0, 0.8])
@pytest.mark.parametrize("identity", [0.0, 0.5])
def test_any_combination_of_losses_works(l2, perceptual, identity):
    x, y = (torch.rand(3, 3, 8, 8, generator=rng(0, n), dtype=torch.float64) * 2 - 1 for n in "xy")
    losses = Losses(l2, perceptual, colour(), identity, lambda image: image.flatten(1))
    moved = x.clone().requires_grad_()
    loss, plain = reconstruction_loss(moved, y, losses, target_features(losses, y))
    loss.sum().backward()
    a, b = x.numpy(), y.numpy()
    cosine = [(p * q).sum() / np.linalg.norm(p) / np.linalg.norm(q) for p, q in zip(a, b)]
    by_hand = (l2 * ((a - b) ** 2).mean((1, 2, 3)) + perceptual * ((a.mean((2, 3)) - b.mean((2, 3))) ** 2).sum(1)
               + identity * (1 - np.array(cosine)))
    assert np.allclose(loss.detach().numpy(), by_hand) and np.allclose(plain.numpy(), ((a - b) ** 2).mean((1, 2, 3)))
    assert moved.grad.any() == bool(l2 or perceptual or identity)


def test_a_step_is_the_mean_gradient_of_all_passes_and_training_lowers_the_error():
    g = generator()
    pool = ((factorize.render(g, draw_codes(g, 16, 8)).flip(3) + 1) * 127.5).round().to(torch.uint8)
    images = type("Pool", (list,), {"batch": staticmethod(lambda picks: pool[picks])})(range(16))
    p = SimpleNamespace(hyper_width=8, hyper_units=(1, 1, 1, 1), hyper_code=16, hyper_kimg=0.2, hyper_batch=8, hyper_lr=3e-3,
                        hyper_passes=2, hyper_start="w+", hyper_ramp=0.0)
    nets, t = Frozen(g, Mean(g), Losses(lpips_weight=0)), begin_hyper(p, g, 0)
    before = {name: value.detach().clone() for name, value in t.hyper.named_parameters()}
    logs = [float(hyper_step(t, p, nets, images, 0)["l2"]) for _ in range(25)]
    assert t.step == 25 and np.mean(logs[-4:]) < 0.75 * logs[0]
    assert all(not torch.equal(value, before[name]) for name, value in t.hyper.named_parameters() if value.ndim > 1)
    flat = start_codes(Mean(g), torch.rand(3, 3, 16, 16), "w")
    assert torch.equal(flat[:, 0], flat[:, -1]) and torch.allclose(flat[:, 0], start_codes(Mean(g), torch.rand(3, 3, 16, 16), "w+").mean(1), atol=1)


CHANGES = {"image_px": "16", "phantom_lesions": "60", "z_dim": "8", "w_dim": "8", "channel_base": "128", "channel_max": "16",
           "hyper_width": "4", "hyper_code": "8", "hyper_kimg": "0.096", "hyper_batch": "8", "hyper_passes": "2",
           "hyper_lpips_weight": "0", "invert_steps": "4", "invert_batch": "6", "pti_steps": "3", "invert_sources": "9",
           "factor_images": "8", "enc_kimg": "0.032", "enc_batch": "16", "enc_lpips_weight": "0"}
CHILD = """
import sys
from pathlib import Path
from dermgan.core import read_run
from dermgan.hypertrain import train_hyperstyle
train_hyperstyle(read_run(Path(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = resolve_run("smoke", 0, CHANGES, root=tmp_path_factory.mktemp("runs"))
    pack_phantom(made)
    save_generator(made.path("ckpt", "generator.safetensors"), generator())
    train_encoder(made)
    return made


def copied(run, folder):
    return core.read_run(shutil.copytree(run.folder, folder / run.folder.name))


def test_killed_and_resumed_equals_uninterrupted(run, tmp_path):
    other = copied(run, tmp_path)
    whole = train_hyperstyle(run)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(other.folder)], env=env, stderr=subprocess.DEVNULL)
    file, until = other.path("ckpt", "hyperstyle.pt"), time.monotonic() + 60
    while not file.exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert file.exists()
    resumed = train_hyperstyle(other)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    lines = [[{k: v for k, v in json.loads(line).items() if k != "seconds"}
              for line in r.path("hyperstyle.jsonl").read_text().splitlines()] for r in (run, other)]
    assert lines[0] == lines[1] and lines[0][-1]["step"] == 12


def test_a_stop_in_the_middle_of_a_step_loses_nothing(run, tmp_path, monkeypatch):
    train_hyperstyle(run)
    other = copied(run, tmp_path)
    for name in ("hyperstyle.pt", "hyperstyle.pt.prev", "hyperstyle.safetensors"):
        other.path("ckpt", name).unlink(missing_ok=True)
    other.path("hyperstyle.jsonl").unlink()
    calls, real = [], hypertrain.reconstruction_loss

    def stopping(*words):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(*words)
    monkeypatch.setattr(hypertrain, "reconstruction_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_hyperstyle(other)
    assert load_state(other.path("ckpt", "hyperstyle.pt"))["step"] == 8
    monkeypatch.setattr(hypertrain, "reconstruction_loss", real)
    monkeypatch.setattr(hypertrain, "hyper_made_by", lambda run, nets: load_state(run.path("ckpt", "hyperstyle.pt"))["made_by"])
    again, whole = train_hyperstyle(other), open_hyperstyle(run)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_finished_work_is_not_done_again_and_other_networks_are_refused(run, tmp_path, monkeypatch):
    whole = train_hyperstyle(run)
    with monkeypatch.context() as patch:
        patch.setattr(hypertrain, "pass_errors", None)
        assert torch.equal(next(train_hyperstyle(run).parameters()), next(whole.parameters()))
    other, changed = copied(run, tmp_path), generator()
    changed.mapping.fc0.weight.mul_(1.5)
    save_generator(other.path("ckpt", "generator.safetensors"), changed)
    for file in other.folder.glob("ckpt/encoder*"):
        file.unlink()
    train_encoder(other)
    with pytest.raises(RunMismatch, match="generator"):
        train_hyperstyle(other)
    with pytest.raises(RunMismatch, match="generator"):
        open_hyperstyle(other)
    with pytest.raises(RunMismatch, match="encoder"):
        load_hyperstyle(run.path("ckpt", "hyperstyle.safetensors"), generator(), changed)
    other.path("ckpt", "hyperstyle.safetensors").unlink()
    with pytest.raises(DataMissing, match="08_hypertrain"):
        open_hyperstyle(other)
    with pytest.raises(DataRefused, match="no hypernetwork"):
        load_hyperstyle(other.path("ckpt", "generator.safetensors"), generator(), open_encoder(run))
    with pytest.raises(ConfigError, match="do not fill a batch"):
        train_hyperstyle(replace(run, profile=replace(run.profile, hyper_batch=4096), folder=copied(run, tmp_path / "few").folder))


@pytest.fixture(scope="module")
def nets():
    g = generator()
    return Nets(g, None, Mean(g), lively(), passes=2)


@pytest.mark.parametrize("method", ["e4e", "hyperstyle", "projector", "pti"])
def test_every_method_inverts_keeps_and_draws(method, nets, tmp_path):
    how = {"projector": {"steps": 8}, "pti": {"steps": 8}}.get(method, {})
    images = factorize.render(nets.g, draw_codes(nets.g, 3, 4)).flip(3)
    found = invert(images, method, nets=nets, batch=2, **how)
    drawn = render(found, nets=nets)
    assert torch.allclose(found.l2, (drawn - images).square().mean((1, 2, 3)), atol=1e-6) and torch.isnan(found.lpips).all()
    ids, again = load_inverted(save_inverted(tmp_path / "x.pt", found, list("abc")), nets)
    assert ids == list("abc") and torch.equal(render(again, nets=nets), drawn)
    moved = render(found, factorize.move(found.ws, torch.eye(8)[0], 3.0), nets=nets)
    assert moved.shape == drawn.shape and (moved - drawn).abs().max() > 1e-3
    other = generator()
    other.synthesis.b4.const.mul_(1.1)
    with pytest.raises(RunMismatch, match="generator"):
        render(found, nets=nets._replace(g=other))
    with pytest.raises(RunMismatch, match="generator"):
        load_inverted(tmp_path / "x.pt", nets._replace(g=other))


@pytest.mark.parametrize("bad,says", [(torch.zeros(2, 1, 16, 16), "shape"), (torch.zeros(2, 3, 32, 32), "16 px"), (torch.full((1, 3, 16, 16), 200.0), "200"),
                                      (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "uint8"), (torch.full((1, 3, 16, 16), float("nan")), "nan")])
def test_wrong_images_are_refused_in_three_lines(bad, says, nets):
    for method in ("e4e", "projector"):
        with pytest.raises(DataRefused, match=says) as caught:
            invert(bad, method, nets=nets, **({"steps": 1} if method == "projector" else {}))
        assert len(str(caught.value).splitlines()) == 3


def test_pivotal_tuning_is_adam_on_every_synthesis_weight():
    g = generator(torch.float64)
    target, ws = factorize.render(g, draw_codes(g, 1, 4)).flip(3).double(), draw_codes(g, 1, 6)
    change = tune_pivot(g, target, ws, None, Tuning(3, stop=0.0))
    copy = generator(torch.float64).requires_grad_(True)
    adam = torch.optim.Adam(copy.synthesis.parameters(), 0.105 / 3)
    for _ in range(3):
        adam.zero_grad()
        (copy.synthesis(ws, "const") - target).square().mean().backward()
        adam.step()
    by_hand = torch.cat([(a - b).detach().flatten() for a, b in zip(copy.synthesis.parameters(), g.synthesis.parameters())])
    assert (change - by_hand).abs().max() < 1e-9
    assert (draw_pivot(g, ws, change[None]) - copy.synthesis(ws, "const").detach().float().clamp(-1, 1)).abs().max() < 1e-6


def test_pivotal_tuning_stops_when_it_is_near():
    g, near = generator(), lambda x, y: (x - y).square().mean((1, 2, 3))
    ws = draw_codes(g, 1, 6)
    target = factorize.render(g, ws)
    assert not tune_pivot(g, target, ws, near, Tuning(5)).any()
    assert tune_pivot(g, target.flip(3), ws, near, Tuning(5, stop=0.0)).any()


def test_editability_is_the_slope_on_generated_effects():
    typical, own = (torch.randn(n, 6, generator=rng(n, "e"), dtype=torch.float64) for n in (9, 4))
    mean = typical.numpy().mean(0)
    assert np.allclose(slopes(own, typical).numpy(), [np.linalg.lstsq(mean[:, None], row, rcond=None)[0][0] for row in own.numpy()])
    axis = torch.eye(8, dtype=torch.float64)[0]
    draw = lambda ws: (0.1 * ws.mean(1)[:, :1, None, None]).expand(-1, 3, 4, 4)
    measure = lambda x: pd.DataFrame({"light": x.mean((1, 2, 3)).numpy()})
    effects, far = edit_effects(draw, torch.zeros(2, 6, 8), [Transformation("", axis, [0, 1, 2], 2.0)], pd.Series({"light": 0.5}),
                                lambda x, y, layers: (x - y).abs().mean((1, 2, 3)), measure)
    assert torch.allclose(effects, torch.full((2, 1), 0.1 * 2.0 / 2 / 0.5).double()) and torch.allclose(far, torch.full((2, 1), 0.1))


def test_diagnosis_and_outliers():
    x = torch.stack([torch.full((3, 4, 4), v) for v in (-0.5, 0.2, 0.7)])
    by_light = lambda images: torch.stack([images.mean((1, 2, 3)), -images.mean((1, 2, 3))], 1)
    assert agreement(by_light, x, x * torch.tensor([1.0, -1, 1])[:, None, None, None]).tolist() == [1, 0, 1]
    known = torch.tensor([1.0, 2, 3, 4, 5])
    assert outliers(torch.tensor([3.0, 9.9, 10.1]), known).tolist() == [False, False, True]
    assert stripes(16).unique().tolist() == [-1, 1]


def test_the_table_of_methods_and_the_profiles_choice(run, monkeypatch):
    train_hyperstyle(run)
    monkeypatch.setattr(compare, "run_moves", lambda run, g: [Transformation("", torch.eye(8, dtype=torch.float64)[0], [0, 1], 1.0)])
    nets = hyperstyle.open_nets(run)
    frame = compare.compare_methods(run, nets)
    by_light = lambda x: torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1)
    frame = pd.concat([frame, pd.DataFrame(compare.diagnosis_rows(run, nets, by_light))])
    assert {"mean code", "nearest training image", "e4e", "HyperStyle", "projector W", "projector W+", "PTI"} == set(frame.method)
    wide = frame.pivot(index="method", columns="metric", values="value")
    assert np.isfinite(wide.loc["HyperStyle"]).all() and wide.diagnosis.between(0, 1).all() and (wide.seconds.dropna() > 0).all()
    assert wide.bytes["e4e"] == 6 * 8 * 4 and wide.bytes["projector W"] == 8 * 4 and wide.bytes["HyperStyle"] == (6 * 8 + 5 * 9) * 4
    assert frame.set_index(["method", "metric"]).paper["e4e", "l2"] == 0.009
    for method in ("e4e", "projector"):
        chosen = replace(run, profile=replace(run.profile, invert_method=method))
        ids, found = hyperstyle.inverted_sources(chosen)
        again = hyperstyle.inverted_sources(chosen)
        assert len(ids) == 9 and again[0] == ids and torch.equal(again[1].ws, found.ws) and found.method == method


@pytest.mark.filterwarnings("error")
def test_a_bright_image_is_measured_without_a_warning():
    bright = torch.full((1, 3, 32, 32), 0.5)
    from dermgan.hyperstyle import distance_to
    from dermgan.metrics import open_lpips
    l2, distance = distance_to(bright, bright - 0.25, open_lpips(None))
    assert l2.item() == 0.0625 and distance.item() >= 0
