"""GAN training: a killed run loses nothing, other settings are refused, NaN stops, the average follows its formula."""
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from dermgan import gan
from dermgan.core import CLASSES, DataMissing, NotFinite, RunMismatch, load_state, read_run, resolve_run, rng, save_atomic
from dermgan.store import pack_images

CHANGES = {"image_px": "16", "z_dim": "8", "w_dim": "8", "channel_base": "128", "channel_max": "16", "gan_batch": "8",
           "gan_kimg": "0.32", "gan_tick_kimg": "0.08", "gan_fd_images": "16", "precision": "fp32"}


def make_run(root, **changes):
    "A run of 40 steps with a checkpoint every ten."
    run = resolve_run("smoke", 0, CHANGES | changes, root=root)
    for split in ("train", "val"):
        draw = np.random.default_rng(len(split))
        pictures = [draw.integers(0, 256, (16, 16, 3)).astype(np.uint8) for _ in range(24)]
        pack_images(run.path("lmdb", split), pictures, [f"{split}{k}" for k in range(24)], [k % 7 for k in range(24)],
                    [f"{split}-l{k}" for k in range(24)], CLASSES, 16)
    return run


def digest(run):
    "One sha256 of everything that the checkpoint's tensors and numbers hold."
    total = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            total.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                add(value[key])
        elif isinstance(value, list | tuple):
            for part in value:
                add(part)
        else:
            total.update(repr(value).encode())

    add({k: v for k, v in load_state(run.path("ckpt", "gan.pt")).items() if k != "step_seconds"})
    return total.hexdigest()


DYING = """
import os, signal, sys
from pathlib import Path
from dermgan import gan
from dermgan.core import read_run

name, moment, calls = sys.argv[2], sys.argv[3], 0
real = getattr(gan, name)

def dying(*args):
    global calls
    calls += 1
    if moment == "before" and calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*args)
    if moment == "after" and calls == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(gan, name, dying)
gan.train_gan(read_run(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("name, moment, step", [("log", "after", 0), ("log", "before", 10), ("save_atomic", "after", 20), ("save_atomic", "before", 20)])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, name, moment, step):
    whole, killed = make_run(tmp_path / "whole"), make_run(tmp_path / "killed")
    gan.train_gan(whole)
    child = subprocess.run([sys.executable, "-c", DYING, killed.folder, name, moment], env=os.environ)
    assert child.returncode == -signal.SIGKILL
    saved = killed.path("ckpt", "gan.pt")
    assert (load_state(saved)["step"] if saved.exists() else 0) == step
    gan.train_gan(read_run(killed.folder))
    assert digest(killed) == digest(whole)
    losses = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in run.path("stats.jsonl").read_text().splitlines()]
              for run in (whole, killed)]
    assert losses[0] == losses[1]
    published = [run.path("ckpt", "generator.safetensors").read_bytes() for run in (whole, killed)]
    assert published[0] == published[1]


def test_a_finished_run_returns_at_once_and_a_longer_one_goes_on(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    gan.train_gan(run)
    before = digest(run)
    monkeypatch.setattr(gan, "open_images", lambda *_: pytest.fail("trained again"))
    gan.train_gan(run)
    assert digest(run) == before
    with pytest.raises(pytest.fail.Exception):
        gan.train_gan(replace(run, profile=replace(run.profile, gan_kimg=0.4)))


@pytest.mark.parametrize("key, value", [("gan_lr", 0.1), ("gan_batch", 16), ("channel_max", 8)])
def test_other_settings_are_refused_by_name(tmp_path, key, value):
    run = make_run(tmp_path, gan_kimg="0.08")
    gan.train_gan(run)
    before = digest(run)
    with pytest.raises(RunMismatch, match=key) as refusal:
        gan.train_gan(replace(run, profile=replace(run.profile, gan_kimg=0.32, **{key: value})))
    assert "--restart" in str(refusal.value) and digest(run) == before


def test_other_code_is_refused(tmp_path):
    run = make_run(tmp_path, gan_kimg="0.08")
    gan.train_gan(run)
    state = load_state(run.path("ckpt", "gan.pt"))
    save_atomic(run.path("ckpt", "gan.pt"), state | {"made_by": state["made_by"] | {"code": "00000000"}})
    with pytest.raises(RunMismatch, match="code"):
        gan.train_gan(run)


def test_a_value_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    step = gan.train_step

    def poisoned(t, *rest):
        if t.step == 25:
            t.d.b16.conv0.weight.data[0, 0, 0, 0] = math.nan
        return step(t, *rest)

    monkeypatch.setattr(gan, "train_step", poisoned)
    with pytest.raises(NotFinite, match="d.b16.conv0.weight|g\\."):
        gan.train_gan(run)
    state = load_state(run.path("ckpt", "gan.pt"))
    assert state["step"] == 20
    assert all(torch.isfinite(v).all() for net in ("g", "d", "ema") for v in state[net].values())


def test_the_average_follows_its_formula_through_the_ramp(tmp_path):
    run = make_run(tmp_path)
    p = replace(run.profile, gan_ema_kimg=0.001, gan_ema_ramp=0.05)
    t = gan.begin(p, 0, "fp32")
    for step in (4, 100):
        t.step = step
        before = [q.double().clone() for q in t.ema.parameters()]
        for q in t.g.parameters():
            q.data.add_(0.5)
        gan.update_average(t, p)
        half_life = min(1.0, step * 8 * 0.05)
        beta = 2.0 ** (-8 / half_life)
        for old, new, now in zip(before, t.g.parameters(), t.ema.parameters()):
            assert torch.allclose(now.double(), beta * old + (1 - beta) * new.double(), atol=1e-6)
    p = replace(p, gan_ema_kimg=20.0)
    t.step = 100
    before = [q.double().clone() for q in t.ema.parameters()]
    for q in t.g.parameters():
        q.data.add_(0.5)
    gan.update_average(t, p)
    beta = 2.0 ** (-8 / 40)
    assert all(torch.allclose(now.double(), beta * old + (1 - beta) * new.double(), atol=1e-6)
               for old, new, now in zip(before, t.g.parameters(), t.ema.parameters()))


def test_a_batch_in_parts_gives_the_gradient_of_the_whole():
    weight = torch.nn.Parameter(torch.randn(5, generator=rng(0), dtype=torch.float64))
    x = torch.randn(8, 5, generator=rng(1), dtype=torch.float64)
    stepped = []
    for parts in (1, 2, 4):
        copy = torch.nn.Parameter(weight.detach().clone())
        gan.apply(torch.optim.SGD([copy], 0.1), ((part @ copy).square().mean() / parts for part in x.chunk(parts)))
        stepped.append(copy.detach())
    assert all(torch.allclose(other, stepped[0], atol=1e-12) for other in stepped[1:])


def test_lazy_regularisers_correct_adam():
    net = torch.nn.Linear(2, 2)
    for every, c in ((0, 1.0), (4, 0.8), (16, 16 / 17)):
        group = gan.lazy_adam(net, 0.002, every).param_groups[0]
        assert group["lr"] == pytest.approx(0.002 * c) and group["betas"] == pytest.approx((0.0, 0.99**c))


def test_no_generator_yet_is_said(tmp_path):
    with pytest.raises(DataMissing, match="--until 05_gan"):
        gan.open_generator(make_run(tmp_path))


def test_published_weights_bring_the_course_of_their_training(tmp_path):
    run, folder = resolve_run("smoke", 0, root=tmp_path), tmp_path / "published"
    folder.mkdir()
    assert gan.training_course(run, "stats.jsonl", "gan_curves.csv") == []
    begun = replace(run, published=folder)
    assert gan.training_course(begun, "stats.jsonl", "gan_curves.csv") == []
    (folder / "gan_curves.csv").write_text("step,kimg,distance\n32,1.024,\n64,2.048,5.5\n")
    course = gan.training_course(begun, "stats.jsonl", "gan_curves.csv")
    assert [row["kimg"] for row in course] == [1.024, 2.048] and math.isnan(course[0]["distance"])
    gan.log(begun, {"step": 1, "kimg": 0.5})
    assert gan.training_course(begun, "stats.jsonl", "gan_curves.csv") == [{"step": 1, "kimg": 0.5}]
