"""One training in several processes: the numbers of one process, whatever the layout, and a killed process costs nothing."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from dermgan import gan, parallel
from dermgan.core import CLASSES, ConfigError, NotFinite, RunMismatch, load_state, read_run, resolve_run
from dermgan.settings import ProcessLost
from dermgan.store import pack_images

CHANGES = {"image_px": "16", "z_dim": "8", "w_dim": "8", "channel_base": "128", "channel_max": "16", "gan_batch": "16",
           "gan_kimg": "0.192", "gan_tick_kimg": "0.064", "gan_fd_images": "16", "precision": "fp32", "gan_r1_every": "2",
           "gan_pl_every": "3", "gan_pl_weight": "2", "gan_crop": "0.8"}


def make_run(root, **changes):
    "A run of 12 steps with a checkpoint every four."
    run = resolve_run("smoke", 0, CHANGES | changes, root=root)
    for split in ("train", "val"):
        draw = np.random.default_rng(len(split))
        pictures = [draw.integers(0, 256, (16, 16, 3)).astype(np.uint8) for _ in range(24)]
        pack_images(run.path("lmdb", split), pictures, [f"{split}{k}" for k in range(24)], [k % 7 for k in range(24)],
                    [f"{split}-l{k}" for k in range(24)], CLASSES, 16)
    return run


def torchrun(count, *words, restarts=0, timeout=900):
    "Real processes on this machine; the finished torchrun."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
               "--max-restarts", str(restarts), *map(str, words)]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout)


STEPS = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from dermgan import allot, classify, encode, gan, hypertrain, parallel
from dermgan.core import read_run
from dermgan.data import open_images
from dermgan.stylegan2 import Generator

def steps(run, cuts, count, state=None):
    "Train in float64 with every phase due, noise switched on, from a state where one is given."
    torch.set_default_dtype(torch.float64)
    p, images, logs = replace(run.profile, gan_accumulate=cuts), open_images(run, "train"), []
    t = gan.begin(p, 0, "fp32")
    for name, q in t.g.named_parameters():
        if name.endswith("noise_strength"):
            q.data.fill_(0.2)
    t = gan.unpack(t, state) if state else t
    for _ in range(count):
        logs.append({k: v.item() for k, v in gan.train_step(t, p, images, 0).items()})
    torch.set_default_dtype(torch.float32)
    return gan.pack(t, {"logs": logs})

def toy():
    "A generator to be inverted."
    torch.manual_seed(5)
    g = Generator(16, 8, 8, 128, 16, 2).eval().requires_grad_(False)
    g.w_avg.copy_(g.mapping(torch.randn(64, 8)).mean(0))
    return g

def encode_steps(run):
    "Four steps of the encoder in float64, with every loss on, clipped, its pool full from the second step."
    torch.set_default_dtype(torch.float64)
    p = replace(run.profile, enc_batch=8, enc_width=4, enc_clip=0.05, enc_synthetic_weight=0.3, enc_pool=12, enc_r1_every=2,
                enc_start_kimg=0.0, enc_every_kimg=0.008)
    g = toy()
    t = encode.begin_fit(p, g, 0)
    logs = [encode.fit_step(t, p, g, None, None, open_images(run, "train"), 0) for _ in range(4)]
    torch.set_default_dtype(torch.float32)
    kept = {name: getattr(t, name).state_dict() for name in encode.NETS}
    return kept | {"pool": t.pool, "logs": [{k: v.item() for k, v in row.items()} for row in logs]}

def hyper_steps(run):
    "Four steps of HyperStyle in float64, two passes each."
    torch.set_default_dtype(torch.float64)
    p, g = replace(run.profile, hyper_batch=8, hyper_passes=2, hyper_ramp=0.0), toy()
    nets = hypertrain.Frozen(g, lambda x: g.w_avg.expand(len(x), g.num_ws, -1), hypertrain.Losses(lpips_weight=0))
    t = hypertrain.begin_hyper(p, g, 0)
    logs = [hypertrain.hyper_step(t, p, nets, open_images(run, "train"), 0) for _ in range(4)]
    torch.set_default_dtype(torch.float32)
    kept = {"hyper": t.hyper.state_dict(), "adam": t.adam.state_dict()}
    return kept | {"logs": [{k: v.item() for k, v in row.items()} for row in logs]}

def classify_steps(run):
    "An epoch of a classifier in float64, without dropout: three batches of eight images and one of five, which no two processes share."
    torch.set_default_dtype(torch.float64)
    p, images = replace(run.profile, cls_batch=8, cls_dropout=0.0, cls_epochs=2), open_images(run, "train")
    doubled = [(image.repeat_interleave(2, 1).repeat_interleave(2, 2), label) for image, label in images]
    pool = allot.Pool(doubled, images.labels, [], 29, ())
    fit = classify.begin(replace(run, profile=p), "densenet_small", 7, 0, "fp32")
    fit.optimizer = torch.optim.SGD(fit.model.parameters(), 0.1, momentum=0.9)  # Adam divides a gradient near 0 by its own noise
    loss = classify.train_epoch(replace(run, profile=p), fit, pool, 0, lambda: None)
    kept = {"model": fit.model.state_dict(), "optimizer": fit.optimizer.state_dict(), "loss": loss}
    torch.set_default_dtype(torch.float32)
    return kept

if __name__ == "__main__":
    run = read_run(Path(sys.argv[1]))
    with parallel.join(run) as here:
        for what in sys.argv[3:]:
            state = {"encoder": encode_steps, "hyper": hyper_steps, "classifier": classify_steps}[what](run) if what.isalpha() else steps(run, int(what), 4)
            if here.rank == here.size - 1:
                torch.save(state, f"{sys.argv[2]}-{here.size}x{what}.pt")
"""


def flat(state):
    "Every number of a state, by name."
    found = {}

    def add(name, value):
        if isinstance(value, dict | list):
            for key, part in (value.items() if isinstance(value, dict) else enumerate(value)):
                add(f"{name}.{key}", part)
        elif isinstance(value, torch.Tensor | float | int):
            found[name] = torch.as_tensor(value, dtype=torch.float64).flatten()

    add("", {k: v for k, v in state.items() if k not in ("best", "precision")})
    return found


def difference(a, b):
    "The largest difference of two states, relative to each tensor's size, and where it is."
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys() and len(a) > 100
    return max((float((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-3)), k) for k in a)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    "The steps as a file that torchrun can run, and as a function."
    file = tmp_path_factory.mktemp("steps") / "steps.py"
    file.write_text(STEPS)
    names = {"__name__": "steps"}
    exec(compile(STEPS, str(file), "exec"), names)
    return file, names["steps"], {"encoder": names["encode_steps"], "hyper": names["hyper_steps"], "classifier": names["classify_steps"]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, script):
    "Four steps of one process on the whole batch."
    run = make_run(tmp_path_factory.mktemp("alone"))
    return run, script[1](run, 1, 4)


def test_parts_of_a_batch_give_the_numbers_of_the_whole(alone, script):
    run, whole = alone
    assert all({"loss_g", "loss_d", "sign_real"} <= row.keys() for row in whole["logs"])
    assert [("path_length" in row, "r1" in row) for row in whole["logs"]] == [(True, True), (False, False), (False, True), (True, False)]
    for cuts in (2, 4):
        assert difference(whole, script[1](run, cuts, 4))[0] < 1e-10


@pytest.mark.parametrize("count, what", [(2, ("1", "2", "encoder", "hyper", "classifier")), (4, ("1", "encoder", "classifier"))])
def test_processes_give_the_numbers_of_one(alone, script, tmp_path, count, what):
    run, whole = alone
    done = torchrun(count, script[0], run.folder, tmp_path / "state", *what)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in what:
        one = script[2][name](run) if name.isalpha() else whole
        assert difference(one, load_state(tmp_path / f"state-{count}x{name}.pt"))[0] < 1e-10, name


def test_another_layout_goes_on_from_a_state(alone, script):
    run, whole = alone
    half = script[1](run, 4, 2)
    rest = script[1](run, 2, 2, half)
    assert difference(whole, rest | {"logs": half["logs"] + rest["logs"]})[0] < 1e-10


TRAIN = """
import os, signal, sys
from pathlib import Path
from dermgan import gan, reproduce

to_float, (victim, at), calls = gan.to_float, map(int, sys.argv[2:]), 0

def dying(images):
    "Kill one process without a word, between two checkpoints, the first time it gets there; or hand it nonsense."
    global calls
    calls += 1
    if calls == at + 1 and os.environ["RANK"] == str(victim) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return to_float(images) * (float("nan") if calls == at + 1 and victim < 0 else 1)

gan.to_float = dying
sys.exit(reproduce.main(["train", "gan", sys.argv[1]]))
"""


@pytest.fixture
def train(tmp_path):
    "The real command, with a process that dies."
    file = tmp_path / "train.py"
    file.write_text(TRAIN)
    return file


def numbers(run):
    "The checkpoint's numbers, and the log without times."
    lines = [json.loads(line) for line in run.path("stats.jsonl").read_text().splitlines()]
    return load_state(run.path("ckpt", "gan.pt")), [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_a_killed_process_costs_the_steps_since_the_checkpoint_and_nothing_else(tmp_path, train):
    calm, hit = make_run(tmp_path / "calm", processes="2"), make_run(tmp_path / "hit")
    gan.train_gan(calm)
    done = torchrun(2, train, hit.folder, 1, 10, restarts=1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "exitcode: -9" in done.stderr
    (state, lines), (hurt, again) = numbers(calm), numbers(hit)
    assert difference(state, hurt)[0] == 0 and lines == again
    assert [line["step"] for line in lines] == [4, 8, 12] and all("distance" in line for line in lines)
    published = [run.path("ckpt", "generator.safetensors").read_bytes() for run in (calm, hit)]
    assert published[0] == published[1]


def reachable(port):
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def wait_for(happened, longest=300):
    begin = time.monotonic()
    while not happened():
        assert time.monotonic() - begin < longest, "it never happened"
        time.sleep(0.05)


def node(port, run):
    "One machine of two, as far as torchrun knows: the README's command."
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "gan", "-m", "dermgan.reproduce", "train", "gan", str(run.folder)]
    told = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, env=os.environ | told, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def test_a_node_is_lost_in_the_middle_comes_back_and_nothing_changes(tmp_path):
    calm, hit = (make_run(tmp_path / name, gan_kimg="0.64", **more) for name, more in (("calm", {"processes": "2"}), ("hit", {})))
    gan.train_gan(calm)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = [node(port, hit)]
    try:
        wait_for(lambda: reachable(port))
        nodes.append(node(port, hit))
        wait_for(lambda: hit.path("ckpt", "gan.pt").exists())
        os.killpg(nodes[1].pid, signal.SIGKILL)
        nodes[1].communicate()
        nodes.append(node(port, hit))
        said = [each.communicate(timeout=600)[1] for each in (nodes[0], nodes[2])]
        assert [each.returncode for each in nodes] == [0, -signal.SIGKILL, 0], said[0][-2000:] + said[1][-2000:]
    finally:
        for each in nodes:
            each.kill()
    (state, lines), (hurt, again) = numbers(calm), numbers(hit)
    assert difference(state, hurt)[0] == 0 and lines == again and lines[-1]["step"] == 40


def test_an_error_that_would_come_again_stops_all_processes_and_is_told(tmp_path, train, monkeypatch):
    run, command = make_run(tmp_path), parallel.subprocess.Popen

    def poisoned(words, **more):
        cut = words.index("-m", 3)
        return command([*words[:cut], train, run.folder, "-1", "6"], **more)

    monkeypatch.setattr(parallel.subprocess, "Popen", poisoned)
    with pytest.raises(NotFinite, match="precision=fp32"):
        gan.train_gan(replace(run, profile=replace(run.profile, processes=2)))
    assert load_state(run.path("ckpt", "gan.pt"))["step"] == 4
    assert len(run.path("stats.jsonl").read_text().splitlines()) == 1


def test_processes_that_keep_dying_are_given_up(tmp_path):
    run, file = make_run(tmp_path), tmp_path / "dies.py"
    file.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(ProcessLost, match="2 processes were started 1 times") as error:
        parallel.launch(run, [str(file)], 2, restarts=0)
    assert len(str(error.value).split("\n")) == 3 and "goes on from it" in str(error.value)


def place(monkeypatch, rank, size):
    "Stand where torchrun would put a process."
    for key, value in {"TORCHELASTIC_RUN_ID": "test", "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}.items():
        monkeypatch.setenv(key, str(value))


def test_alone_nothing_is_sent_and_no_group_is_made(tmp_path, monkeypatch):
    import torch.distributed as dist
    for name in ("all_reduce", "broadcast_object_list", "barrier", "init_process_group"):
        monkeypatch.setattr(dist, name, lambda *_, **__: pytest.fail("talked"))
    monkeypatch.setenv("WORLD_SIZE", "8")  # another launcher's; without torchrun it says nothing about this process
    value = torch.ones(3)
    with parallel.join(make_run(tmp_path)) as here:
        parallel.add_up([value])
        parallel.wait()
        parallel.require_same([value], "", "")
    assert here.size == 1 and parallel.agree("x") == "x" and torch.equal(value, torch.ones(3))


@pytest.mark.parametrize("batch, size, cuts, told", [
    (16, 3, 1, "Processes may be 1, 2, 4; or take a batch that 12 divides, such as 24."), (16, 8, 1, "be 1, 2, 4; or"),
    (2, 4, 1, "Processes may be 1; or take a batch that 8 divides"), (16, 2, 3, "Take a batch that 24 divides, such as 24."), (6, 1, 1, "such as 8")])
def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, monkeypatch, batch, size, cuts, told):
    place(monkeypatch, 0, size)
    profile = replace(make_run(tmp_path).profile, gan_batch=batch, gan_accumulate=cuts)
    with pytest.raises(ConfigError) as error:
        gan.step_draws(profile, 0, 0)
    lines = str(error.value).split("\n")
    assert len(lines) == 3 and told in lines[2]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place(monkeypatch, 3, 4)
    with pytest.raises(ConfigError, match="4 processes share a machine with 2 GPUs") as error:
        parallel.take_device()
    assert "--nproc-per-node 2" in str(error.value)


def test_all_gpus_are_taken_as_far_as_the_batch_can_be_shared(monkeypatch):
    for gpus, batch, cuts, expected in ((0, 64, 1, 1), (8, 64, 1, 8), (6, 64, 1, 4), (8, 8, 1, 2), (4, 64, 8, 2), (4, 2, 1, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        assert parallel.processes(0, batch, cuts, 4) == expected
    assert parallel.processes(3, 64, 1, 4) == 3
    place(monkeypatch, 0, 2)
    assert parallel.processes(0, 64, 1, 4) == 1


DIFFER = """
import sys, torch
from pathlib import Path
from dermgan.core import read_run
from dermgan.parallel import join, require_same
with join(read_run(Path(sys.argv[1]))) as here:
    require_same([torch.ones(3), torch.zeros(2)], "weights", "Fix.")
    require_same([torch.ones(3), torch.full((2,), 1e-7 * here.rank)], "weights", "Fix.")
"""


def test_weights_that_came_apart_stop_the_job(tmp_path):
    run, file = make_run(tmp_path), tmp_path / "differ.py"
    file.write_text(DIFFER)
    with pytest.raises(RunMismatch, match="1 of 2 sums differ"):
        parallel.launch(run, [str(file), str(run.folder)], 2, restarts=0)


def test_the_layout_is_no_part_of_what_a_run_is(tmp_path):
    one, four = (resolve_run("smoke", 0, CHANGES | more, root=tmp_path) for more in ({}, {"processes": "4", "gan_accumulate": "2"}))
    assert one.folder == four.folder and gan.made_by(one) == gan.made_by(four)
    assert resolve_run("smoke", 0, CHANGES | {"gan_batch": "32"}, root=tmp_path).folder != one.folder
    assert read_run(one.folder).profile.processes == 4
