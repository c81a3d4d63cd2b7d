"""The encoder restated by plain functions in float64; its losses by hand; a killed training loses nothing."""
import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from dermgan import core, encode, trunk
from dermgan.core import DataMissing, DataRefused, NotFinite, RunMismatch, load_state, load_weights, read_profile, resolve_run, rng, save_weights
from dermgan.encode import (active_offsets, begin_fit, code_loss, decoder_key, delta_penalty, exchange, fit_step, last_quarter_gain,
                            open_encoder, open_features, reconstruct, train_critic, train_encoder, weigh)
from dermgan.factorize import draw_codes, render
from dermgan.phantom import pack_phantom
from dermgan.stylegan2 import Generator, save_generator
from dermgan.trunk import Critic, Encoder, Heads, check_images, trunk_strides


def generator(dtype=torch.float32):
    torch.manual_seed(0)
    g = Generator(16, z_dim=8, w_dim=8, channel_base=128, channel_max=16, mapping_layers=2).to(dtype).eval().requires_grad_(False)
    for px in g.synthesis.px:
        g.synthesis.get_submodule(f"b{px}.torgb").weight.mul_(0.2)
    g.mapping.w_avg.copy_(g.mapping(torch.randn(512, 8, generator=rng(0, "w")).to(dtype)).mean(0))
    return g


def uniform(*shape, dtype=torch.float64):
    return (torch.rand(*shape, generator=rng(0, "uniform", *shape), dtype=torch.float64) * 2 - 1).to(dtype)


class Set(list):
    def __init__(self, pictures):
        super().__init__(range(len(pictures)))
        self.pictures = pictures

    def batch(self, places):
        return self.pictures[places]


def tiny(**changes):
    return replace(read_profile("smoke"), enc_batch=4, enc_kimg=0.04, enc_start_kimg=0.008, enc_every_kimg=0.004, precision="fp32", **changes)


# the network, from its tensors alone

def norm(x, s, name):
    mean, var, weight, bias = (s[f"{name}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def prelu(x, slope):
    return torch.where(x > 0, x, x * slope[:, None, None])


def unit_by_hand(x, s, name, stride):
    y = F.conv2d(norm(x, s, f"{name}.body.0"), s[f"{name}.body.1.weight"], padding=1)
    y = norm(F.conv2d(prelu(y, s[f"{name}.body.2.weight"]), s[f"{name}.body.3.weight"], stride=stride, padding=1), s, f"{name}.body.4")
    squeeze, excite = (s[f"{name}.gate.{i}.weight"][:, :, 0, 0] for i in (1, 3))
    gate = 1 / (1 + (-((y.mean((2, 3)) @ squeeze.T).clamp(min=0) @ excite.T)).exp())
    if f"{name}.shortcut.0.weight" in s:
        short = norm(torch.einsum("nchw,oc->nohw", x[:, :, ::stride, ::stride], s[f"{name}.shortcut.0.weight"][:, :, 0, 0]), s, f"{name}.shortcut.1")
    else:
        short = x[:, :, ::stride, ::stride]
    return y * gate[:, :, None, None] + short


def up_by_hand(x, side):
    "Bilinear with corners aligned, as two small matrices."
    n = x.shape[-1]
    at = torch.arange(side, dtype=x.dtype) * (n - 1) / (side - 1)
    m = (1 - (at[:, None] - torch.arange(n, dtype=x.dtype)).abs()).clamp(min=0)
    return m @ x @ m.T


def encoder_by_hand(images, s, shape):
    s = {k.removeprefix("pyramid."): v for k, v in s.items()}
    px = min(shape["image_px"], 256)
    x = images.unflatten(2, (px, -1)).unflatten(4, (px, -1)).mean((3, 5))
    x = prelu(norm(F.conv2d(x, s["stem.0.weight"], padding=1), s, "stem.1"), s["stem.2.weight"])
    taps = []
    for i, count in enumerate(shape["units"]):
        halve = px >= 64 or i >= 1 and px == 32
        for j in range(count):
            x = unit_by_hand(x, s, f"stages.{i}.{j}", 2 if halve and j == 0 else 1)
        taps.append(x)
    levels = [taps[3]]
    for tap, i in ((taps[2], 0), (taps[1], 1)):
        side = torch.einsum("nchw,oc->nohw", tap, s[f"lateral.{i}.weight"][:, :, 0, 0]) + s[f"lateral.{i}.bias"][:, None, None]
        levels.append(up_by_hand(levels[-1], tap.shape[-1]) + side)
    answers, width = [], 8 * shape["width"]
    for k in range(shape["num_ws"]):
        level, first = (0, 0) if k < 3 else (1, 3) if k < 7 else (2, 7)
        y, part = levels[level], slice((k - first) * width, (k - first + 1) * width)
        for c in range(round(math.log2(y.shape[-1]))):
            y = F.conv2d(y, s[f"heads.{level}.convs.{c}.weight"][part], s[f"heads.{level}.convs.{c}.bias"][part], 2, 1)
            y = torch.where(y > 0, y, 0.01 * y)
        answers.append(y[:, :, 0, 0] @ s[f"heads.{level}.weight"][k - first] / width**0.5 + s[f"heads.{level}.bias"][k - first, 0])
    first = answers[0] + s["w_avg"]
    return torch.stack([first] + [first + a for a in answers[1:]], 1)


@pytest.mark.parametrize("image_px, num_ws, units", [(32, 8, (1, 2, 1, 1)), (64, 10, (2, 1, 1, 1)), (512, 16, (1, 1, 1, 1))])
def test_the_network_restated_from_its_tensors(image_px, num_ws, units):
    torch.manual_seed(1)
    net = Encoder(image_px, num_ws, 6, 2, units).double()
    net.w_avg.copy_(torch.randn(6))
    net.train()(uniform(4, 3, image_px, image_px))
    net.eval()
    images = uniform(2, 3, image_px, image_px)
    with torch.no_grad():
        ws = net(images)
        assert (ws - encoder_by_hand(images, net.state_dict(), net.shape)).abs().max() < 1e-10
        assert torch.allclose(net(images[:1])[0], ws[0], atol=1e-12)
        assert torch.equal(net(images, 0), ws[:, :1].expand_as(ws))
        assert torch.equal(net(images, 3)[:, :4], ws[:, :4]) and torch.equal(net(images, 3)[:, 4:], ws[:, :1].expand_as(ws)[:, 4:])


def test_every_size_from_32_to_1024_gives_its_codes_and_levels_of_4_px_or_more():
    for px in (32, 64, 128, 256, 512, 1024):
        num_ws = 2 * round(math.log2(px)) - 2
        net = Encoder(px, num_ws, 8, 1, (1, 1, 1, 1)).eval()
        with torch.no_grad():
            sides = [level.shape[2] for level in net.pyramid(torch.zeros(1, 3, min(px, 256), min(px, 256)))]
        assert min(sides) >= 4 and sides == sorted(sides) and [2 ** len(h.convs) for h in net.heads] == sides
        assert sum(h.count for h in net.heads) == num_ws and [h.count for h in net.heads] == [3, 4, num_ws - 7]
    assert trunk_strides(256) == trunk_strides(64) == [2, 2, 2, 2] and trunk_strides(32) == [1, 2, 2, 2]


@pytest.mark.parametrize("px, millions", [(256, 209.5), (512, 238.3), (1024, 267.1)])
def test_the_paper_s_size_has_the_published_number_of_parameters(px, millions):
    with torch.device("meta"):
        net = Encoder(px, 2 * round(math.log2(px)) - 2, 512)
    assert round(sum(q.numel() for q in net.parameters()) / 1e6, 1) == millions


def test_gradients_of_batched_heads_equal_those_of_separate_heads():
    torch.manual_seed(0)
    heads, x = Heads(4, 8, 3, 5).double(), uniform(2, 4, 8, 8).requires_grad_()
    weight = uniform(2, 3, 5)
    batched = torch.autograd.grad((heads(x) * weight).sum(), [x, *heads.parameters()])
    total = 0
    for k in range(3):
        y = x
        for conv in heads.convs:
            y = F.leaky_relu(F.conv2d(y, conv.weight[4 * k:4 * k + 4], conv.bias[4 * k:4 * k + 4], 2, 1), 0.01)
        total = total + ((y.flatten(1) @ heads.weight[k] / 2 + heads.bias[k]) * weight[:, k]).sum()
    for a, b in zip(batched, torch.autograd.grad(total, [x, *heads.parameters()])):
        assert (a - b).abs().max() < 1e-10


# the losses

def test_offsets_are_switched_on_as_published():
    for step in (0, 19_999, 20_000, 21_999, 22_000, 47_999, 48_000, 199_999):
        assert active_offsets(step * 8 / 1000, 160, 16, 16) == (0 if step < 20_000 else min(15, (step - 20_000) // 2000 + 1))


def test_delta_penalty_and_the_pool_by_loops():
    ws = uniform(3, 5, 4)
    by_hand = sum(sum(math.sqrt(sum((float(ws[n, i, d] - ws[n, 0, d])) ** 2 for d in range(4))) for n in range(3)) / 3 for i in range(1, 5))
    assert abs(float(delta_penalty(ws)) - by_hand) < 1e-10
    flat = ws[:, :1].expand(-1, 5, -1).clone().requires_grad_()
    assert torch.isfinite(torch.autograd.grad(delta_penalty(flat), flat)[0]).all()
    codes, gen, coin = torch.arange(300.0)[:, None], rng(0, "a"), rng(0, "a")
    pool, kept, judged, expected = codes[:0], [], [], []
    for part in codes.split(7):
        pool, out = exchange(pool, part, 20, gen)
        judged += out.flatten().tolist()
        for value in part.flatten().tolist():
            if len(kept) < 20:
                kept.append(value)
                expected.append(value)
            elif float(torch.rand((), generator=coin)) < 0.5:
                i = int(torch.randint(20, (), generator=coin))
                expected.append(kept[i])
                kept[i] = value
            else:
                expected.append(value)
    assert judged == expected and pool.flatten().tolist() == kept and len(set(judged) - set(codes[:20].flatten().tolist())) > 200


def test_losses_of_a_batch_by_hand_and_the_generator_stays_frozen():
    g = generator(torch.float64)
    p = tiny(enc_features="none")
    t = begin_fit(p, g, 0)
    t.net.double()
    targets = uniform(4, 3, 16, 16)
    colour = lambda x: x.mean((2, 3)) + 1.5
    before = copy.deepcopy(g.state_dict())
    ws, parts = reconstruct(t, p, g, None, colour, targets, 2)
    images = g.synthesis(ws, "const")
    assert abs(parts["l2"] - ((images - targets) ** 2).sum() / targets.numel()) < 1e-12 and float(parts["lpips"]) == 0
    a, b = colour(images), colour(targets)
    cosine = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
    assert abs(parts["feature"] - (1 - cosine).mean()) < 1e-10
    assert torch.equal(ws[:, 3:], ws[:, :1].expand(-1, 3, -1))
    total = weigh(parts, p)
    assert abs(total - (p.enc_l2_weight * parts["l2"] + p.enc_delta_weight * parts["delta"] + p.enc_feature_weight * parts["feature"])) < 1e-12
    total.backward()
    assert all(q.grad is None for q in g.parameters()) and all(torch.equal(v, before[k]) for k, v in g.state_dict().items())
    assert all(h.weight.grad is not None for h in t.net.heads)


def test_code_loss_is_zero_for_the_truth_and_one_for_the_mean():
    g = generator()
    codes = {}

    def truth(images, stage):
        w = g.mapping(torch.randn(64, 8, generator=rng(3, "z")))
        codes["images"], codes["w"] = images, w
        return w[:, None].expand(-1, g.num_ws, -1)
    assert float(code_loss(truth, g, 64, 0, rng(3, "z"))) == 0
    assert torch.equal(codes["images"], render(g, codes["w"][:, None].expand(-1, g.num_ws, -1)))
    mean = code_loss(lambda images, stage: g.w_avg.expand(64, g.num_ws, -1), g, 64, 0, rng(3, "z"))
    assert abs(float(mean) - 1) < 1e-6


def test_the_critic_s_step_in_float64(monkeypatch):
    g, p = generator(torch.float64), tiny(enc_pool=0, enc_r1_gamma=10.0, enc_r1_every=16)
    t = begin_fit(p, g, 0)
    t.critic, seen = Critic(8).double(), []
    monkeypatch.setattr(encode, "apply", lambda optimizer, losses: seen.extend(losses) or seen[-1])
    fakes = uniform(6, 8)
    train_critic(t, p, g, fakes, rng(0, "z"))
    reals = g.mapping(torch.randn(6, 8, generator=rng(0, "z")).double()).requires_grad_()
    softplus = lambda x: torch.log1p(torch.exp(x))
    assert abs(seen[0] - softplus(t.critic(fakes)).mean() - softplus(-t.critic(reals)).mean()) < 1e-6
    squares = [torch.autograd.grad(t.critic(r[None]).sum(), reals, retain_graph=True)[0].square().sum() for r in reals]
    assert abs(seen[1] - 16 * 10 / 2 * sum(squares) / 6) < 1e-8
    t.step = 5
    train_critic(t, p, g, fakes, rng(0, "z"))
    assert len(seen) == 3


def test_the_published_encoder_is_an_average_and_copies_where_none_is_asked_for():
    g = generator()
    pictures = Set(((render(g, draw_codes(g, 12, 0)) + 1) * 127.5).to(torch.uint8))
    t = begin_fit(tiny(enc_ema_kimg=0.0), g, 0)
    fit_step(t, tiny(enc_ema_kimg=0.0), g, None, None, pictures, 0)
    assert all(torch.equal(a, b) for a, b in zip(t.net.state_dict().values(), t.ema.state_dict().values()))
    p = tiny(enc_ema_kimg=1.0)
    t = begin_fit(p, g, 0)
    t.step = 3
    before = copy.deepcopy(t.ema.state_dict())
    fit_step(t, p, g, None, None, pictures, 0)
    beta = 0.5 ** (4 / min(1000.0, 0.1 * 4 * 4))
    name = "heads.0.weight"
    expected = before[name] * beta + t.net.state_dict()[name] * (1 - beta)
    assert torch.allclose(t.ema.state_dict()[name], expected, atol=1e-6) and not torch.equal(before[name], t.net.state_dict()[name])


def test_convergence_is_the_gain_of_the_last_quarter():
    rows = [{"step": s, "l2": v} for s, v in zip((1, 2, 3, 4), (0.5, 0.2, 0.3, 0.1))]
    assert abs(last_quarter_gain(rows) - 0.5) < 1e-12 and math.isnan(last_quarter_gain(rows[:1]))


# the training of a run

CHANGES = {"image_px": "16", "phantom_lesions": "60", "z_dim": "8", "w_dim": "8", "enc_batch": "4", "enc_kimg": "0.016", "enc_tick_kimg": "0.008",
           "enc_width": "2", "enc_start_kimg": "0.008", "enc_every_kimg": "0.008", "enc_pool": "6", "enc_lpips_weight": "0.8", "enc_synthetic_weight": "0.5", "precision": "fp32"}
CHILD = """
import sys
from pathlib import Path
from dermgan import encode
from dermgan.core import read_run
real = encode.keep
def slow(*given):
    real(*given)
    print("kept", flush=True)
    import time
    time.sleep(60)
encode.keep = slow
encode.train_encoder(read_run(Path(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    made = resolve_run("smoke", 0, CHANGES, root=tmp_path_factory.mktemp("runs"))
    pack_phantom(made)
    save_generator(made.path("ckpt", "generator.safetensors"), generator())
    return made


@pytest.fixture(scope="module")
def done(start, tmp_path_factory):
    run = copy_run(start, tmp_path_factory.mktemp("done"))
    train_encoder(run)
    return run


def copy_run(run, folder):
    return core.read_run(shutil.copytree(run.folder, folder / run.folder.name))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def equal_runs(one, other):
    a, b = (load_state(r.path("ckpt", "encoder.pt")) for r in (one, other))
    assert a["step"] == b["step"] == 4 and len(a["pool"]) == 6 and len(a["opt"]["state"]) > 50
    assert [k for k in a if not same(a[k], b[k])] == []
    assert one.path("encoder.jsonl").read_text() == other.path("encoder.jsonl").read_text()
    assert same(*(load_weights(r.path("ckpt", "encoder.safetensors")) for r in (one, other)))


def test_two_steps_and_two_more_are_four_in_every_tensor(start, done, tmp_path, monkeypatch):
    other, calls, real = copy_run(start, tmp_path), [], encode.to_float

    def stopping(*given):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*given)
    with monkeypatch.context() as patch:
        patch.setattr(encode, "to_float", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_encoder(other)
    assert load_state(other.path("ckpt", "encoder.pt"))["step"] == 2
    torch.manual_seed(99)
    train_encoder(other)
    equal_runs(done, other)


def test_a_training_that_is_lengthened_is_the_longer_one(start, done, tmp_path):
    short = replace(start, profile=replace(start.profile, enc_kimg=0.008))
    other = replace(copy_run(start, tmp_path), profile=short.profile)
    train_encoder(other)
    assert load_state(other.path("ckpt", "encoder.pt"))["step"] == 2
    train_encoder(replace(other, profile=start.profile))
    equal_runs(done, other)


def test_the_rate_drops_once_and_the_gradient_is_limited():
    g = generator()
    for p, kimg, scale, limit in ((tiny(enc_drop_kimg=0.0, enc_clip=0.0), 9.0, 1, None), (tiny(enc_drop_kimg=0.5, enc_clip=1e-3), 0.4, 1, 1e-3),
                                  (tiny(enc_drop_kimg=0.5, enc_clip=1e-3), 0.5, 0.1, 1e-3)):
        t = begin_fit(p, g, 0)
        encode.descend(t, p, 100 * t.net(torch.ones(2, 3, 16, 16)).square().sum(), kimg)
        length = math.sqrt(sum(float(q.grad.double().square().sum()) for q in t.net.parameters() if q.grad is not None))
        assert t.opt.param_groups[0]["lr"] == pytest.approx(scale * p.enc_lr)
        assert length > 1 if limit is None else length == pytest.approx(limit, rel=1e-3)


def test_killed_by_the_system_and_resumed(start, done, tmp_path):
    other = copy_run(start, tmp_path)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(other.folder)], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout.readline() == "kept\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert load_state(other.path("ckpt", "encoder.pt"))["step"] == 2
    train_encoder(other)
    equal_runs(done, other)


def test_finished_work_is_not_done_again_and_is_opened_in_eval_mode(done, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", None)
    net = train_encoder(done)
    assert isinstance(net, Encoder) and not any(m.training for m in net.modules()) and not any(q.requires_grad for q in net.parameters())
    rows = [json.loads(line) for line in done.path("encoder.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4] and all(math.isfinite(v) for row in rows for v in row.values())
    assert {"l2", "train_l2", "lpips", "delta", "adv", "synthetic", "critic", "kimg"} <= rows[0].keys()
    facts = load_weights(done.path("ckpt", "encoder.safetensors"))[1]
    assert facts["l2"] == min(row["l2"] for row in rows) and facts["generator"] == decoder_key(generator())
    assert net(uniform(1, 3, 16, 16, dtype=torch.float32)).shape == (1, 6, 8)


def three_lines(error, *words):
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and all(lines) and all(word in str(error.value) for word in words), str(error.value)


def test_another_generator_and_other_settings_are_refused(done, tmp_path):
    other = copy_run(done, tmp_path)
    changed = generator()
    changed.mapping.fc0.weight.mul_(1.5)
    save_generator(other.path("ckpt", "generator.safetensors"), changed)
    for call in (train_encoder, open_encoder):
        with pytest.raises(RunMismatch) as error:
            call(other)
        three_lines(error, "generator", decoder_key(changed), decoder_key(generator()))
    with pytest.raises(RunMismatch) as error:
        train_encoder(replace(done, profile=replace(done.profile, enc_lr=0.1)))
    three_lines(error, "enc_lr", "0.1")


def test_other_code_is_refused(done, monkeypatch):
    monkeypatch.setattr(encode, "delta_penalty", last_quarter_gain)
    with pytest.raises(RunMismatch, match="code"):
        train_encoder(done)


def test_a_published_pair_of_half_precision_is_taken(done, tmp_path):
    folder = tmp_path / "figures"
    for name in ("generator", "encoder"):
        tensors, facts = load_weights(done.path("ckpt", f"{name}.safetensors"))
        save_weights(folder / f"{name}.safetensors", {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}, facts)
    fresh = resolve_run("smoke", 0, CHANGES, published=str(folder), root=tmp_path / "runs")
    net = train_encoder(fresh)
    images = uniform(2, 3, 16, 16, dtype=torch.float32)
    assert torch.allclose(net(images), open_encoder(done)(images), atol=0.02) and next(net.parameters()).dtype == torch.float32


def test_what_is_missing_or_too_small_is_said_in_three_lines(start, tmp_path):
    with pytest.raises(DataMissing) as error:
        open_encoder(start)
    three_lines(error, "07_encode")
    with pytest.raises(DataRefused) as error:
        train_encoder(replace(start, profile=replace(start.profile, enc_batch=1000)))
    three_lines(error, "1000", "enc_batch")
    for weights in (None, tmp_path):
        with pytest.raises(DataMissing) as error:
            open_features(replace(start, weights=weights, profile=replace(start.profile, enc_features="moco")))
        three_lines(error, "moco", "enc_features=none")


def test_moco_s_checkpoint_is_read_and_projects_to_2048_numbers(start, tmp_path):
    net = core.import_torchvision().models.resnet50(weights=None)
    state = {f"module.encoder_q.{k}": v for k, v in net.state_dict().items()}
    torch.save({"arch": "resnet50", "state_dict": state | {"module.queue": torch.zeros(2)}}, tmp_path / encode.MOCO)
    features = open_features(replace(start, weights=tmp_path, profile=replace(start.profile, enc_features="moco")))
    assert features(uniform(1, 3, 16, 16, dtype=torch.float32)).shape == (1, 2048)


@pytest.mark.parametrize("images, word", [
    (torch.zeros(1, 3, 32, 32), "32"), (torch.zeros(1, 1, 16, 16), "[1, 1, 16, 16]"), (torch.zeros(3, 16, 16), "[3, 16, 16]"),
    (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "uint8"), (torch.full((1, 3, 16, 16), 200.0), "200"),
    (torch.full((1, 3, 16, 16), math.nan), "nan")])
def test_images_of_another_kind_are_refused_in_three_lines(images, word):
    for call in (lambda: check_images(images, 16), lambda: Encoder(16, 6, 8, 2, (1, 1, 1, 1))(images)):
        with pytest.raises(DataRefused) as error:
            call()
        three_lines(error, word, "[-1, 1]")


def test_no_images_are_no_codes():
    net = Encoder(16, 6, 8, 2, (1, 1, 1, 1)).eval()
    assert net(torch.zeros(0, 3, 16, 16)).shape == (0, 6, 8)


def test_a_diverged_training_stops_and_keeps_its_last_good_checkpoint(done, tmp_path, monkeypatch):
    other = copy_run(done, tmp_path)
    longer = replace(other, profile=replace(other.profile, enc_kimg=0.024))
    state = load_state(other.path("ckpt", "encoder.pt"))
    state["net"]["heads.0.weight"].fill_(math.nan)
    core.save_atomic(other.path("ckpt", "encoder.pt"), state)
    with pytest.raises(NotFinite) as error:
        train_encoder(longer)
    three_lines(error, "the code", "step 4", "enc_lr")
    assert load_state(other.path("ckpt", "encoder.pt"))["step"] == 4
