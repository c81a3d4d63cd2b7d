"""Files that survive a kill, a full disk and flipped bits (R1, R2, R7, R15); seeds; settings."""
import errno
import hashlib
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch

from dermgan import core

WRITER = """
import sys, torch
from pathlib import Path
from dermgan.core import save_atomic
path, step = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while True:
    step += 1
    save_atomic(path, {"step": step, "w": torch.full((2**24,), float(step))})
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_checkpoint(tmp_path):
    path, draw = tmp_path / "state.pt", random.Random(0)
    core.save_atomic(path, {"step": 0, "w": torch.zeros(2**24)})
    last = 0
    for trial in range(20):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(last)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0, 0.3))
        writer.send_signal(signal.SIGKILL)
        written = [int(line) for line in writer.stdout.read().split()]
        writer.wait()
        state = core.load_state(path)
        done = written[-1] if written else last
        assert state["step"] in (done, done + 1), f"trial {trial}: {state['step']} after {done}"
        assert torch.equal(state["w"], torch.full((2**24,), float(state["step"])))
        last = state["step"]
    core.remove_temporaries(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"state.pt", "state.pt.prev"}


def test_temporaries_of_the_living_stay(tmp_path):
    mine, dead = tmp_path / f".a.tmp-{os.getpid()}", tmp_path / ".b.tmp-4194999"
    mine.touch(), dead.touch()
    assert core.remove_temporaries(tmp_path) == [dead] and mine.exists()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    path = core.save_atomic(tmp_path / "state.pt", {"step": 1, "w": torch.arange(9.0)})
    before = path.read_bytes()

    def write_then_fill(file):
        file.write(b"x" * 3 * 2**20)
        file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(core.DiskFull) as caught:
        core.write_atomic(path, write_then_fill)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["state.pt"]
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and "disk is full" in lines[0] and "3 MiB" in lines[1] and "MiB" in lines[2]


def test_another_error_is_tried_once_more(tmp_path, monkeypatch):
    waits, tries = [], []
    monkeypatch.setattr(core.time, "sleep", waits.append)

    def flaky(file):
        tries.append(1)
        if len(tries) == 1:
            raise OSError(errno.EIO, "once")
        file.write(b"whole")

    assert core.write_atomic(tmp_path / "a", flaky).read_bytes() == b"whole" and waits == [2]


def test_the_state_before_stays_as_prev(tmp_path):
    for step in (1, 2, 3):
        core.save_atomic(tmp_path / "s.pt", {"step": step})
    assert core.load_state(tmp_path / "s.pt")["step"] == 3
    assert core.load_state(tmp_path / "s.pt.prev")["step"] == 2


@pytest.mark.parametrize("stored, named", [
    ({"gan_lr": 0.001, "code": "a"}, "gan_lr"), ({"gan_lr": 0.002, "code": "b"}, "code"), ({"code": "a"}, "gan_lr")])
def test_a_checkpoint_of_other_settings_or_code_is_refused(stored, named):
    with pytest.raises(core.RunMismatch) as caught:
        core.check_made_by(stored, {"gan_lr": 0.002, "code": "a"}, "gan.pt")
    lines = str(caught.value).splitlines()
    assert named in lines[0] and "--restart" in lines[2]
    core.check_made_by({"gan_lr": 0.002, "code": "a"}, {"code": "a", "gan_lr": 0.002}, "gan.pt")


def test_code_key_sees_code_and_not_prose(tmp_path, monkeypatch):
    versions = {"a": "def f(x):\n    return x + 1\n", "b": 'def f(x):\n    "Add one."\n    return x + 1  # really\n',
                "c": "def f(x):\n    return x + 2\n"}
    monkeypatch.syspath_prepend(tmp_path)
    keys = {}
    for name, text in versions.items():
        (tmp_path / f"version_{name}.py").write_text(text)
        keys[name] = core.code_key(__import__(f"version_{name}").f)
    assert keys["a"] == keys["b"] != keys["c"]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    side = tmp_path / "side-effect"
    for save in (lambda p: torch.save({"step": 1, "x": Evil(str(side))}, p),
                 lambda p: p.write_bytes(pickle.dumps({"x": Evil(str(side))}))):
        path = tmp_path / "evil.pt"
        save(path)
        with pytest.raises(core.DataRefused):
            core.load_state(path)
    assert not side.exists()


def test_damaged_weights_are_refused(tmp_path):
    path = core.save_weights(tmp_path / "w.safetensors", {"w": torch.randn(64, 64)}, {"image_px": 64})
    good, draw = path.read_bytes(), random.Random(0)
    assert hashlib.sha256(good).hexdigest() in (tmp_path / "w.safetensors.sha256").read_text()
    for _ in range(32):
        flipped = bytearray(good)
        flipped[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(core.DataRefused):
            core.load_weights(path)
    (tmp_path / "w.safetensors.sha256").unlink()
    for length in (0, 7, 100, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(core.DataRefused):
            core.load_weights(path)
    path.write_bytes(good)
    tensors, facts = core.load_weights(path)
    assert facts == {"image_px": 64} and tensors["w"].shape == (64, 64)
    with pytest.raises(core.DataMissing):
        core.load_weights(tmp_path / "absent.safetensors")


def test_named_draws_are_independent_of_order_and_differ_by_name():
    first = {step: torch.randn(4, generator=core.rng(3, "noise", step)) for step in range(20)}
    again = {step: torch.randn(4, generator=core.rng(3, "noise", step)) for step in reversed(range(20))}
    assert all(torch.equal(first[s], again[s]) for s in first)
    seeds = {core.named_seed(seed, name, step) for seed in range(5) for name in "ab" for step in range(20)}
    assert len(seeds) == 200 and all(0 <= s < 2**63 for s in seeds)
    assert core.named_seed(0, "noise", 1) == int(hashlib.sha256(b'[0, "noise", "1"]').hexdigest()[:15], 16)


def test_seed_all_seeds_the_three_generators():
    draws = []
    for _ in range(2):
        core.seed_all(7)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


SETTINGS = "[DEFAULT]\n" + "\n".join(f"{k} = {v}" for k, v in {
    **{k: ", ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in asdict(core.read_profile("paper")).items()
       if k != "name"}}.items()) + "\n[a]\nimage_px = 32\n[b]\n"


def test_a_profile_inherits_and_lists_what_is_allowed(tmp_path):
    path = tmp_path / "settings.ini"
    path.write_text(SETTINGS)
    assert core.profile_names(path) == ["a", "b"]
    a, b = core.read_profile("a", path=path), core.read_profile("b", path=path)
    assert (a.image_px, b.image_px) == (32, 512) and a.sa_images == b.sa_images == (400, 800, 1200, 1600, 2000)
    assert core.read_profile("a", {"image_px": "64"}, path).image_px == 64
    for call, words in ((lambda: core.read_profile("c", path=path), ["'c'", "a, b"]),
                        (lambda: core.read_profile("a", {"image_pix": "1"}, path), ["image_pix", "image_px"]),
                        (lambda: core.read_profile("a", {"image_px": "wide"}, path), ["image_px", "int", "settings.ini"]),
                        (lambda: core.read_profile("a", {"precision": "fp8"}, path), ["precision", "bf16"])):
        with pytest.raises(core.ConfigError) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 3 and all(w in str(caught.value) for w in words)
    path.write_text(SETTINGS.replace("gan_lr", "gan_lrr"))
    with pytest.raises(core.ConfigError, match="gan_lrr"):
        core.read_profile("a", path=path)
    path.write_text("\n".join(line for line in SETTINGS.splitlines() if not line.startswith("gan_lr")))
    with pytest.raises(core.ConfigError, match="gan_lr"):
        core.read_profile("a", path=path)


def test_two_settings_never_share_a_folder(tmp_path):
    runs = [core.resolve_run("smoke", seed, changes, root=tmp_path) for seed in (0, 1)
            for changes in (None, {"gan_lr": "0.1"}, {"sa_images": "1,2"})]
    assert len({run.folder for run in runs}) == 6
    again = core.read_run(runs[-1].folder)
    assert again == runs[-1] and again.profile.sa_images == (1, 2)
    with pytest.raises(core.DataMissing, match="not there"):
        core.resolve_run("smoke", data=str(tmp_path / "none"), root=tmp_path)
    with pytest.raises(core.DataMissing):
        core.read_run(tmp_path)


def test_a_notebook_refuses_parameters_of_another_run(tmp_path, monkeypatch):
    run = core.resolve_run("smoke", 3, root=tmp_path)
    monkeypatch.setenv("DERMGAN_RUN", str(run.folder))
    assert core.open_run("smoke", 3) == run
    with pytest.raises(core.RunMismatch):
        core.open_run("smoke", 4)


def test_a_headless_run_is_told_what_was_made(tmp_path, monkeypatch):
    monkeypatch.setenv("DERMGAN_MADE", str(tmp_path / "made"))
    core.write_text(tmp_path / "a.csv", "value\n")
    assert (tmp_path / "made").read_text().split() == [str(tmp_path / "a.csv")]


def test_a_figure_has_its_data_and_alt_text(tmp_path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import pandas as pd
    run, frame = core.resolve_run("smoke", root=tmp_path), pd.DataFrame({"x": [1, 2], "value": [0.1, 0.25]})
    fig, ax = plt.subplots()
    ax.plot(frame.x, frame.value)
    with pytest.raises(ValueError, match="alt text"):
        core.show(fig, "short")
    fig, ax = plt.subplots()
    core.figure(run, "fig0_test", fig, frame, "A line that rises from a tenth to a quarter over two steps.")
    folder = run.folder / "figures"
    assert {p.name for p in folder.iterdir()} == {"fig0_test.png", "fig0_test.csv", "fig0_test.txt"}
    assert pd.read_csv(folder / "fig0_test.csv").equals(frame)
    first = (folder / "fig0_test.png").read_bytes()
    assert b"Software" not in first and b"date" not in first
    with pytest.raises(ValueError, match="value"):
        core.table(run, "table_x", frame.drop(columns="value"))
