"""The projector against known codes; one image never sees another; a killed run loses nothing."""
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dermgan import core, invert
from dermgan.core import NotFinite, RunMismatch, resolve_run, rng
from dermgan.data import open_images
from dermgan.factorize import draw_codes, render
from dermgan.invert import (draw_sources, fit_start, image_generators, invert_sources, load_inversions, noise_penalty, project,
                            step_size, thumbnails, whiten)
from dermgan.phantom import pack_phantom
from dermgan.stylegan2 import Generator, save_generator


def generator(dtype=torch.float32, image_px=16):
    torch.manual_seed(0)
    g = Generator(image_px, z_dim=8, w_dim=8, channel_base=128, channel_max=16, mapping_layers=2)
    g = g.to(dtype).eval().requires_grad_(False)
    for px in g.synthesis.px:
        g.synthesis.get_submodule(f"b{px}.torgb").weight.mul_(0.2)
    g.mapping.w_avg.copy_(g.mapping(torch.randn(512, 8, generator=rng(0, "w")).to(dtype)).mean(0))
    return g


def test_a_generated_image_is_recovered_from_the_neighbourhood_of_its_code():
    g = generator(torch.float64)
    truth = draw_codes(g, 3, 5)
    targets = render_double(g, truth)
    near = truth[:, 0] + 0.2 * torch.randn(3, 8, generator=rng(0, "near")).double()
    found = project(g, targets, "w", 150, start=lambda images: near, planes=False, jitter=0.0, lr=0.05)
    before = (near - truth[:, 0]).norm(dim=1)
    assert ((found.ws[:, 0] - truth[:, 0]).norm(dim=1) < 0.05 * before).all()
    assert (found.l2 < 1e-5).all() and torch.equal(found.ws[:, 0], found.ws[:, -1])
    assert found.curve.shape == (150, 3) and (found.curve[-1] < 1e-2 * found.curve[0]).all()


def render_double(g, ws):
    with torch.no_grad():
        return g.synthesis(ws, "const")


def test_more_freedom_fits_better_and_zero_steps_are_the_start():
    g = generator()
    targets = render(g, draw_codes(g, 4, 9)).flip(3)
    w, plus = (project(g, targets, space, 60) for space in ("w", "w+"))
    assert plus.l2.mean() < w.l2.mean()
    still = project(g, targets, "w+", 0)
    assert torch.allclose(still.ws, g.w_avg.expand(4, g.num_ws, -1)) and still.curve.shape == (0, 4)
    assert torch.isnan(still.lpips).all()


def test_an_image_does_not_see_which_others_share_its_batch():
    g = generator(torch.float64)
    targets = render_double(g, draw_codes(g, 5, 3))
    whole = project(g, targets, "w+", 12, batch=5)
    for batch, order in ((1, [0, 1, 2, 3, 4]), (2, [4, 2, 0, 1, 3])):
        parts = project(g, targets[order], "w+", 12, batch=batch)
        assert (parts.ws - whole.ws[order]).abs().max() < 1e-9
        assert (parts.l2 - whole.l2[order]).abs().max() < 1e-9
    a, b = (torch.randn(2, generator=image_generators(targets[i:i + 1], 0)[0]) for i in (0, 1))
    assert not torch.equal(a, b)


def test_lpips_enters_the_loss_and_the_result():
    g = generator()
    mean_colour = SimpleNamespace(features=lambda x: [x.mean((2, 3))], distance=lambda a, b: (a[0] - b[0]).square().sum(1))
    lpips = type("L", (), {"features": staticmethod(mean_colour.features), "distance": staticmethod(mean_colour.distance),
                           "__call__": lambda self, x, y: self.distance(self.features(x), self.features(y))})()
    targets = render(g, draw_codes(g, 2, 4))
    found = project(g, targets, "w+", 3, lpips, planes=False, jitter=0.0)
    start = g.synthesis(g.w_avg.expand(2, g.num_ws, -1), "const")
    by_hand = (start - targets).square().mean((1, 2, 3)) + 0.8 * lpips(start.clamp(-1, 1), targets)
    assert torch.allclose(found.curve[0], by_hand, atol=1e-6)
    assert torch.allclose(found.lpips, lpips(render(g, found.ws), targets), atol=1e-6)


def test_noise_penalty_restated_by_loops():
    plane = torch.randn(2, 1, 16, 16, generator=rng(0, "plane"), dtype=torch.float64)
    other = torch.randn(2, 1, 4, 4, generator=rng(1, "plane"), dtype=torch.float64)
    total = np.zeros(2)
    for start in (plane, other):
        n = start.numpy()[:, 0]
        while True:
            side = n.shape[1]
            for i in range(2):
                right = sum(n[i, y, x] * n[i, y, (x - 1) % side] for y in range(side) for x in range(side)) / side**2
                down = sum(n[i, y, x] * n[i, (y - 1) % side, x] for y in range(side) for x in range(side)) / side**2
                total[i] += right**2 + down**2
            if side <= 8:
                break
            n = n.reshape(2, side // 2, 2, side // 2, 2).mean((2, 4))
    assert np.allclose(noise_penalty([plane, other]).numpy(), total, atol=1e-12)
    planes = [3 * plane + 2]
    whiten(planes)
    assert planes[0].mean((1, 2, 3)).abs().max() < 1e-12 and torch.allclose(planes[0].square().mean((1, 2, 3)), torch.ones(2).double())


def test_the_rate_ramps_up_and_down():
    assert step_size(0.0) == 0 and abs(step_size(0.025) - 0.5) < 1e-12 and step_size(0.5) == 1
    assert abs(step_size(0.875) - 0.5) < 1e-12 and step_size(1.0) == 0


def test_the_start_is_ridge_regression():
    g = generator(torch.float64)
    start = fit_start(g, 64, seed=2)
    codes = draw_codes(g, 64, 2)
    x, w = thumbnails(render(g, codes)).double().numpy(), codes[:, 0].numpy()
    xc, wc = x - x.mean(0), w - w.mean(0)
    ridge = (xc**2).sum() / 64
    dual = xc.T @ np.linalg.solve(xc @ xc.T + ridge * np.eye(64), wc)
    probe = render(g, draw_codes(g, 5, 7)).double()
    assert np.allclose(start(probe).numpy(), w.mean(0) + (thumbnails(probe).numpy() - x.mean(0)) @ dual, atol=1e-8)


def test_wrong_size_and_divergence_are_refused():
    g = generator()
    with pytest.raises(ValueError, match="16 px"):
        project(g, torch.zeros(1, 3, 8, 8))
    with pytest.raises(NotFinite, match="smaller lr"):
        project(g, torch.zeros(1, 3, 16, 16), steps=3, lr=float("inf"))


def test_sources_are_balanced_seeded_and_nested():
    labels = torch.tensor([3] * 70 + [1] * 20 + [0] * 3)
    drawn = draw_sources(labels, 30, 0)
    assert len(set(drawn)) == 30 and torch.bincount(labels[drawn], minlength=4).tolist() == [3, 14, 0, 13]
    assert draw_sources(labels, 50, 0)[:30] == drawn != draw_sources(labels, 30, 1)
    assert sorted(draw_sources(labels, 1000, 0)) == list(range(93))


CHILD = """
import sys
from pathlib import Path
from dermgan.core import read_run
from dermgan.invert import invert_sources
invert_sources(read_run(Path(sys.argv[1])), keep_s=0.0)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    changes = {"image_px": "16", "phantom_lesions": "60", "invert_sources": "15", "invert_batch": "3", "invert_steps": "6",
               "z_dim": "8", "w_dim": "8"}
    made = resolve_run("smoke", 0, changes, root=tmp_path_factory.mktemp("runs"))
    pack_phantom(made)
    save_generator(made.path("ckpt", "generator.safetensors"), generator())
    return made


def test_killed_and_resumed_equals_uninterrupted(run, tmp_path):
    other = core.read_run(shutil.copytree(run.folder, tmp_path / run.folder.name))
    ids, whole = invert_sources(run)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(other.folder)], env=env, stderr=subprocess.DEVNULL)
    file, until = other.path("ckpt", "inversions.pt"), time.monotonic() + 60
    while not file.exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert file.exists() and 0 < len(load_inversions(other)[0]) <= 15
    again, resumed = invert_sources(other)
    assert again == ids and torch.equal(resumed.ws, whole.ws) and torch.equal(resumed.l2, whole.l2)


def test_a_stop_between_batches_loses_only_the_batch(run, tmp_path, monkeypatch):
    other = core.read_run(shutil.copytree(run.folder, tmp_path / run.folder.name))
    other.path("ckpt", "inversions.pt").unlink(missing_ok=True)
    calls, real = [], invert.to_float

    def stopping(batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(batch)
    monkeypatch.setattr(invert, "to_float", stopping)
    with pytest.raises(KeyboardInterrupt):
        invert_sources(other, keep_s=0.0)
    assert len(load_inversions(other)[0]) == 9
    ids, resumed = invert_sources(other, keep_s=0.0)
    assert len(calls) == 4 + 2 and ids == invert_sources(run)[0]
    assert torch.equal(resumed.ws, invert_sources(run)[1].ws)


def test_finished_work_is_not_done_again_and_another_generator_is_refused(run, tmp_path, monkeypatch):
    ids, whole = invert_sources(run)
    train = open_images(run, "train")
    assert len(ids) == 15 and set(ids) <= set(train.ids) and torch.isfinite(whole.ws).all()
    with monkeypatch.context() as patch:
        patch.setattr(invert, "to_float", None)
        assert torch.equal(invert_sources(run)[1].ws, whole.ws)
    other = core.read_run(shutil.copytree(run.folder, tmp_path / run.folder.name))
    changed = generator()
    changed.mapping.fc0.weight.mul_(1.5)
    save_generator(other.path("ckpt", "generator.safetensors"), changed)
    with pytest.raises(RunMismatch, match="generator"):
        invert_sources(other)
