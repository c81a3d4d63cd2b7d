"""Little data in the training loop: p outlives a kill, other networks are begun with or refused, frozen layers stay, overfitting is measured."""
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from test_gan import DYING, digest, make_run
from test_stylegan2 import nvlabs  # noqa: F401

from dermgan import gan, transfer
from dermgan.ada import PIPES, Control, follow
from dermgan.core import CLASSES, ConfigError, DataMissing, DataRefused, Profile, file_sha256, load_state, read_profile, read_run, resolve_run, rng
from dermgan.store import pack_images
from dermgan.stylegan2 import Discriminator, Generator, save_generator, save_rosinality

SHAPE = dict(image_px=16, z_dim=8, w_dim=8, channel_base=128, channel_max=16, mapping_layers=2)


def begin_or_resume(run):
    "As `train_gan` does it."
    return gan.resume(run, gan.read_checkpoint(run))


def networks(**more):
    torch.manual_seed(3)
    shape = SHAPE | more
    g, d = Generator(**shape).eval(), Discriminator(shape["image_px"], shape["channel_base"], shape["channel_max"]).eval()
    g.mapping.w_avg.normal_()
    return g, d


def with_(run, **changes):
    return replace(run, profile=replace(run.profile, **changes))


def lines(run):
    return [json.loads(line) for line in run.path("stats.jsonl").read_text().splitlines()]


def test_settings_offer_the_pipes_that_there_are():
    assert set(get_args(get_type_hints(Profile)["gan_aug"])) == {"none", *PIPES}
    assert all(read_profile(name).gan_aug == "none" and read_profile(name).gan_from == "none" for name in ("smoke", "quick", "ham", "paper"))
    assert read_profile("quick", {"gan_aug_p": "0.25"}).gan_aug_p == 0.25
    with pytest.raises(ConfigError, match=r"adaptive \| float"):
        read_profile("quick", {"gan_aug_p": "often"})


def test_p_is_kept_over_a_kill_to_the_bit(tmp_path):
    adaptive = dict(gan_aug="geometry+mild+noise+cutout", gan_aug_target="-1.5", gan_aug_kimg="0.2", gan_kimg="0.24")
    whole, killed = make_run(tmp_path / "whole", **adaptive), make_run(tmp_path / "killed", **adaptive)
    gan.train_gan(whole)
    child = subprocess.run([sys.executable, "-c", DYING, killed.folder, "save_atomic", "before"], env=os.environ)
    assert child.returncode == -signal.SIGKILL
    kept = load_state(killed.path("ckpt", "gan.pt"))
    assert kept["step"] == 20 and kept["aug"]["p"] == pytest.approx(5 * 8 * 4 / 200) and len(kept["aug"]["signs"]) == 0
    early = load_state(killed.path("ckpt", "gan.pt.prev"))["aug"]
    assert early["p"] == pytest.approx(2 * 8 * 4 / 200) and len(early["signs"]) == 2
    gan.train_gan(read_run(killed.folder))
    assert digest(killed) == digest(whole)
    ours, theirs = ([{k: v for k, v in line.items() if k != "seconds"} for line in lines(run)] for run in (killed, whole))
    assert ours == theirs and ours[-1]["augment_p"] == 1.0


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_controller_goes_on_in_the_middle_of_its_four_steps(tmp_path, steps):
    p = make_run(tmp_path).profile
    p = replace(p, gan_aug="bg", gan_aug_target=0.0, gan_aug_kimg=1.0)
    signs = [0.9, -0.3, 0.7, 0.1, 0.5, 0.2, -0.9, 0.3]
    straight = Control()
    for sign in signs:
        follow(straight, p, torch.tensor(sign))
    first = gan.begin(p, 0, "fp32")
    for sign in signs[:steps]:
        follow(first.aug, p, torch.tensor(sign))
    torch.save(gan.pack(first, {}), tmp_path / "state.pt")
    second = gan.unpack(gan.begin(p, 1, "fp32"), load_state(tmp_path / "state.pt"))
    for sign in signs[steps:]:
        follow(second.aug, p, torch.tensor(sign))
    assert second.aug == straight == Control(2 * (8 * 4 / 1000))


def test_a_fixed_p_stays_and_must_be_a_probability(tmp_path):
    run = make_run(tmp_path, gan_aug="geometry", gan_aug_p="0.3", gan_kimg="0.08")
    gan.train_gan(run)
    assert {line["augment_p"] for line in lines(run)} == {0.3}
    with pytest.raises(ConfigError, match="probability"):
        gan.begin(replace(run.profile, gan_aug_p=1.5), 0, "fp32")


def test_without_a_pipe_nothing_is_logged_or_drawn(tmp_path, monkeypatch):
    run = make_run(tmp_path, gan_kimg="0.08")
    monkeypatch.setattr("dermgan.ada.augment_images", lambda *_: pytest.fail("augmented"))
    gan.train_gan(run)
    assert all("augment_p" not in line for line in lines(run)) and load_state(run.path("ckpt", "gan.pt"))["aug"] == {"p": 0.0, "signs": []}


def write_start(kind, folder, nvlabs_writer, g, d):
    if kind == "safetensors":
        return save_generator(folder / "generator.safetensors", g)
    if kind == "rosinality":
        return save_rosinality(folder / "theirs.pt", g, d)
    if kind == "nvlabs":
        return nvlabs_writer(g, d)
    source = make_run(folder / "source", gan_kimg="0.08")
    gan.train_gan(source)
    return source.path("ckpt", "gan.pt")


@pytest.mark.parametrize("kind", ["ours", "safetensors", "rosinality", "nvlabs"])
def test_each_kind_of_file_is_begun_with(tmp_path, nvlabs, kind):  # noqa: F811
    g, d = networks()
    path = write_start(kind, tmp_path, nvlabs, g, d)
    run = make_run(tmp_path / "run", gan_from=str(path))
    t, facts = begin_or_resume(run)
    fresh = gan.begin(run.profile, run.seed, "fp32")
    if kind == "ours":
        state = load_state(path)
        wanted = {name: state[name] for name in ("g", "ema", "d")}
        assert torch.equal(t.pl_mean, state["pl_mean"]) and not torch.equal(state["g"]["synthesis.b4.const"], state["ema"]["synthesis.b4.const"])
    else:
        wanted = {"g": g.state_dict(), "ema": g.state_dict(), "d": (fresh.d if kind == "safetensors" else d).state_dict()}
    for name, state in wanted.items():
        own = getattr(t, name).state_dict()
        assert own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own), name
    assert not torch.equal(t.g.synthesis.b4.const, fresh.g.synthesis.b4.const) and t.step == 0 and not t.opt_g.state
    assert facts["start"] == {"file": path.name, "sha256": file_sha256(path)}
    assert all(q.requires_grad for q in t.g.parameters()) and not any(q.requires_grad for q in t.ema.parameters())


def test_a_transfer_goes_on_without_its_file_and_keeps_its_frozen_layers(tmp_path):
    g, d = networks()
    path = save_rosinality(tmp_path / "theirs.pt", g, d)
    run = make_run(tmp_path / "run", gan_from=str(path), gan_freeze_d="5", gan_kimg="0.16", gan_aug="geometry")
    gan.train_gan(run)
    path.unlink()
    gan.train_gan(with_(run, gan_kimg=0.24))
    state = load_state(run.path("ckpt", "gan.pt"))
    frozen = {"b16.fromrgb", "b16.conv0", "b16.conv1", "b16.skip", "b8.conv0"}
    for key, value in d.state_dict().items():
        assert torch.equal(state["d"][key], value) == (key.rsplit(".", 1)[0] in frozen), key
    assert state["step"] == 30 and state["start"]["file"] == "theirs.pt"
    header = transfer.load_generator(run.path("ckpt", "generator.safetensors"))
    assert header.shape == g.shape


def test_freezing_counts_from_the_image_and_only_what_came_from_somewhere(tmp_path):
    _, d = networks()
    order = [name for name, module in d.named_modules() if module in transfer.first_layers(d)]
    assert order == ["b16.fromrgb", "b16.conv0", "b16.conv1", "b16.skip", "b8.conv0", "b8.conv1", "b8.skip"]
    run = make_run(tmp_path)
    with pytest.raises(ConfigError, match="gan_from is none"):
        begin_or_resume(with_(run, gan_freeze_d=2))
    path = save_generator(tmp_path / "generator.safetensors", networks()[0])
    with pytest.raises(ConfigError, match="holds no discriminator"):
        begin_or_resume(with_(run, gan_freeze_d=2, gan_from=str(path)))
    full = save_rosinality(tmp_path / "theirs.pt", *networks())
    with pytest.raises(ConfigError, match="7 layers"):
        begin_or_resume(with_(run, gan_freeze_d=8, gan_from=str(full)))


@pytest.mark.parametrize("change, named", [({"image_px": 32}, "image_px=32"), ({"z_dim": 12}, "z_dim=12"), ({"w_dim": 12}, "w_dim=12"),
                                           ({"mapping_layers": 3}, "mapping_layers=3"), ({"channel_max": 8}, "channel_max=8"),
                                           ({"channel_base": 64}, "channel_base=64")])
def test_other_shapes_are_refused_with_the_setting_to_change(tmp_path, change, named):
    path = save_rosinality(tmp_path / "theirs.pt", *networks(**change))
    run = make_run(tmp_path, gan_from=str(path))
    with pytest.raises(ConfigError, match=f"--set {named}$") as refusal:
        begin_or_resume(run)
    assert "theirs.pt" in str(refusal.value) and not run.path("ckpt", "gan.pt").exists()
    key, value = named.split("=")
    begin_or_resume(with_(run, **{key: int(value)}))


def test_a_discriminator_of_another_width_is_refused(tmp_path):
    path = save_rosinality(tmp_path / "theirs.pt", networks()[0], networks(channel_max=8)[1])
    with pytest.raises(ConfigError, match="channel_max"):
        begin_or_resume(make_run(tmp_path, gan_from=str(path)))


def test_missing_and_damaged_starts_are_refused(tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    run = make_run(tmp_path, gan_from="there.pt")
    with pytest.raises(DataMissing, match="there.pt"):
        begin_or_resume(run)
    (weights / "there.pt").write_bytes(b"no checkpoint")
    with pytest.raises(DataRefused, match="there.pt"):
        begin_or_resume(replace(run, weights=weights))
    save_rosinality(weights / "there.pt", *networks())
    t, _ = begin_or_resume(replace(run, weights=weights))
    assert torch.equal(t.g.synthesis.b4.const, networks()[0].synthesis.b4.const)


def test_a_transfer_adapts_faster_and_averages_without_a_ramp(tmp_path):
    p = replace(make_run(tmp_path).profile, gan_aug="bg", gan_aug_kimg=500.0, gan_ema_kimg=1.0)
    moved = {}
    for start in ("none", "file.pt"):
        state = Control()
        for _ in range(4):
            follow(state, replace(p, gan_from=start), torch.tensor(1.0))
        moved[start] = state.p
        t = gan.begin(p, 0, "fp32")
        before = t.ema.synthesis.b4.const.clone()
        t.g.synthesis.b4.const.data.add_(1.0)
        t.step = 1
        gan.update_average(t, replace(p, gan_from=start))
        share = (t.ema.synthesis.b4.const - before).mean().item()
        assert share == pytest.approx(1 - 0.5 ** (8 / min(1000, 0.4 if start == "none" else 1000)), rel=1e-3)
    assert moved == {"none": pytest.approx(8 * 4 / 500_000), "file.pt": pytest.approx(8 * 4 / 100_000)}


def test_overfitting_is_logged_at_ticks_where_images_are_held_out(tmp_path):
    run = make_run(tmp_path / "a", gan_kimg="0.4", gan_tick_kimg="0.16")
    gan.train_gan(run)
    assert [(line["step"], "overfitting" in line, "distance" in line) for line in lines(run)] == [(20, True, True), (32, False, False), (40, True, True), (50, True, True)]
    everything = make_run(tmp_path / "b", gan_kimg="0.08", gan_split="all")
    pack_images(everything.path("lmdb", "holdout"), [np.zeros((16, 16, 3), np.uint8)] * 4, list("abcd"), [0] * 4, list("abcd"), CLASSES, 16)
    gan.train_gan(everything)
    assert all("overfitting" not in line for line in lines(everything))


def test_overfitting_compares_the_three_sets_as_the_discriminator_sees_them(tmp_path):
    run = resolve_run("smoke", 0, {"image_px": "16", "gan_crop": "1"}, root=tmp_path)
    for split, value in (("train", 255), ("val", 51)):
        pack_images(run.path("lmdb", split), [np.full((16, 16, 3), value, np.uint8)] * 12, [f"{split}{k}" for k in range(12)], [0] * 12,
                    [f"{split}{k}" for k in range(12)], CLASSES, 16)
    g, _ = networks()
    t = SimpleNamespace(g=g, d=lambda x: x.mean((1, 2, 3)), aug=Control())
    gen = rng(run.seed, "overfitting")
    with torch.no_grad():
        fake = g(torch.randn(12, 8, generator=gen), generator=gen).mean().item()
    found = gan.held_out(run, t)["overfitting"]
    assert found == pytest.approx((1 - (51 / 127.5 - 1)) / (1 - fake), rel=1e-4)
    dark = gan.held_out(with_(run, gan_aug="noise"), replace_aug(t, 1.0))["overfitting"]
    assert dark != found and dark == pytest.approx(found, abs=0.05)


def replace_aug(t, p):
    return SimpleNamespace(g=t.g, d=t.d, aug=Control(p))


def test_a_resumed_run_refuses_another_start(tmp_path):
    from dermgan.core import RunMismatch
    run = make_run(tmp_path, gan_kimg="0.08")
    gan.train_gan(run)
    with pytest.raises(RunMismatch, match="gan_from"):
        gan.train_gan(with_(run, gan_from="other.pt", gan_kimg=0.16))
    with pytest.raises(RunMismatch, match="gan_aug"):
        gan.train_gan(with_(run, gan_aug="bg", gan_kimg=0.16))
