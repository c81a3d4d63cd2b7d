"""Plan before paying: counts against PyTorch's own, memory against real steps and a real limit, the paper's full size for one step of each kind."""
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dermgan import cost, gan, layers, parallel, plan, settings
from dermgan.convolution import plain_form
from dermgan.core import rng
from dermgan.reproduce import main
from dermgan.settings import ConfigError, DermganError, read_profile

NARROW = replace(read_profile("smoke"), image_px=64, channel_base=2048, channel_max=128, w_dim=64, z_dim=64, gan_batch=4, gan_mixing=0.0)


class Multiplications(TorchDispatchMode):
    "Multiply-adds of every operation that runs, forward or backward, by PyTorch's own formulas."

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.total += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=out) / 2
        return out


def test_every_body_of_a_real_step_computes_what_was_counted():
    t, reals = gan.begin(NARROW, 0, "fp32"), torch.randn(4, 3, 64, 64)
    seen = {}
    for body in cost.bodies(NARROW):
        with Multiplications() as counter, plain_form():   # the lean forms' fused kernels carry no count
            cost.take(t, NARROW, body, reals, 0)
        seen[body] = counter.total / 4
    g, d = sum(cost.generator_macs(NARROW).values()), sum(cost.discriminator_macs(NARROW).values())
    wanted = {body: a * g + b * d for body, (a, b) in cost.PASSES.items()}
    alone = seen | {"path length": seen["path length"] - seen["generator"], "R1": seen["R1"] - seen["discriminator"]}
    assert {body: round(alone[body] / wanted[body], 3) for body in wanted if abs(alone[body] / wanted[body] - 1) > 0.05} == {}
    mean = sum(share * alone[body] for body, share in cost.shares(NARROW).items())
    assert sum(cost.step_macs(NARROW).values()) == pytest.approx(mean, rel=0.03)


def test_the_state_is_what_a_training_holds():
    t = gan.begin(NARROW, 0, "fp32")
    before = [q.clone() for q in t.d.parameters()]
    cost.fill_state(t)
    assert all(torch.equal(a, b) for a, b in zip(before, t.d.parameters())), "a gradient of zero moves nothing"
    size = lambda tensors: sum(q.numel() * q.element_size() for q in tensors)
    held = cost.state_bytes(NARROW)
    nets = size([*t.g.parameters(), *t.g.buffers(), *t.d.parameters(), *t.d.buffers()])
    adam = [v for o in (t.opt_g, t.opt_d) for state in o.state.values() for k, v in state.items() if k != "step"]
    assert held["weights"] == nets and held["adam"] == size(adam)
    assert held["average"] == size([*t.ema.parameters(), *t.ema.buffers()])
    assert held["gradients"] == size([q.grad for net in (t.g, t.d) for q in net.parameters()])


def test_a_regulariser_of_every_step_is_measured_too():
    p = replace(NARROW, image_px=8, gan_batch=2, gan_r1_every=1, gan_pl_every=1)
    found = cost.measure_here(p, "fp32", "cpu", repeats=0)
    assert set(found["bodies"]) == {"path length", "R1"} and found["changed"]
    parts = cost.step_seconds(found, p)
    assert sum(parts.values()) == pytest.approx(sum(b["seconds"] for b in found["bodies"].values()) / 2)
    assert set(cost.bodies(replace(p, gan_pl_weight=0.0, gan_r1_every=16))) == {"generator", "discriminator", "R1"}


def test_the_parts_are_those_that_a_training_takes(monkeypatch):
    def taken(batch, processes, cuts):
        monkeypatch.setattr(parallel, "world", lambda: parallel.World(0, processes, 0, processes))
        try:
            return len(parallel.parts(batch, cuts, layers.GROUP)[0]) * min(layers.GROUP, batch)
        except ConfigError:
            return 0

    draw = np.random.default_rng(0)
    for _ in range(200):
        processes, batch, own = (int(draw.integers(1, n)) for n in (9, 129, 4))
        wanted = [(k, n) for k in range(own, batch + 1) if (n := taken(batch, processes, k))]
        p = replace(NARROW, gan_batch=batch, gan_accumulate=own)
        if wanted:
            assert plan.parts(p, processes) == wanted
        else:
            with pytest.raises(ConfigError, match=f"shared by {processes} processes"):
                plan.parts(p, processes)


@pytest.mark.parametrize("words, said", [(["--gpus", "0"], "shared by 0 processes"), (["--gpus", "-2"], "shared by -2"),
                                         (["--tflops", "nan"], "--tflops nan"), (["--memory", "0"], "--memory 0"),
                                         (["--images", "-1"], "--images -1"), (["--profile", "papre"], "papre"),
                                         (["--set", "gan_batch=many"], "gan_batch"), (["--set", "dataset=folder"], "--images N")])
def test_bad_input_ends_in_three_lines_before_anything_runs(words, said, capsys, monkeypatch):
    monkeypatch.setattr(plan, "measure", lambda *a, **k: pytest.fail("measured"))
    assert main(["plan", "--profile", "smoke", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and said in lines[0] + lines[1] + lines[2]


def test_steps_that_fail_for_another_reason_are_no_lack_of_memory():
    with pytest.raises(DermganError, match="could not be measured(.|\n)*power of two"):
        cost.measure(replace(NARROW, image_px=48), 1, "fp32", repeats=0)


def limited(limit: int):
    "Set the address space of a process that is about to start."
    import resource
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of the address space is Linux's")
def test_running_out_of_memory_is_foreseen_and_the_part_that_is_proposed_fits():
    p = replace(read_profile("smoke"), image_px=128, channel_base=1024, gan_batch=96)
    small = cost.measure(p, 2, "fp32", repeats=0)
    limit = max(body["space"] for body in small["bodies"].values()) + 300 * 2**20
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    changes = [word for key in ("image_px", "channel_base", "gan_batch") for word in ("--set", f"{key}={getattr(p, key)}")]
    command = [sys.executable, "-m", "dermgan.reproduce", "plan", "--profile", "smoke", "--json", "--set", "precision=fp32", *changes]
    done = subprocess.run(command, capture_output=True, text=True, env=env, preexec_fn=limited(limit))
    assert done.returncode == 0, done.stderr[-800:]
    made = json.loads(done.stdout)
    assert made["fits"]["accumulate"] > 1 and made["fits"]["part"] * made["fits"]["accumulate"] == 96
    assert made["fits"]["mapped"] < limit
    code = ("import sys, json; from dermgan import cost; from dermgan.settings import read_profile; from dataclasses import replace\n"
            f"p = replace(read_profile('smoke'), image_px={p.image_px}, channel_base={p.channel_base})\n"
            "print(json.dumps([cost.measure(p, n, 'fp32', repeats=0, only=('R1', 'path length')) for n in map(int, sys.argv[1:])]))")
    done = subprocess.run([sys.executable, "-c", code, str(made["fits"]["part"]), "96"], capture_output=True, text=True, env=env,
                          preexec_fn=limited(limit))
    fits, fails = json.loads(done.stdout.splitlines()[-1])
    assert "bodies" in fits and "full" in fails, done.stdout


def test_a_smallest_part_that_is_too_large_is_refused_in_three_lines():
    measured = [{"batch": 1, "full": "bad_alloc"}]
    with pytest.raises(ConfigError, match="Not even 4 image") as caught:
        plan.refuse(measured, {"peak": 2**30, "space": math.inf}, 4)
    assert len(str(caught.value).splitlines()) == 3 and plan.fitting(NARROW, 1, measured, {"peak": 2**40, "space": math.inf}) is None


def test_the_paper_takes_real_steps_at_512_px_within_20_gib():
    p = read_profile("paper")
    assert (p.image_px, p.channel_base, p.gan_pl_weight > 0) == (512, 32768, True)
    found = cost.measure(p, 2, plan.likely_precision(p, "cpu"), repeats=0, only=("path length", "R1"))
    assert set(found["bodies"]) == {"path length", "R1"} and found["image_px"] == 512 and found["batch"] == 2
    assert found["changed"] and all(body["finite"] for body in found["bodies"].values())
    peak = max(body["peak"] for body in found["bodies"].values())
    assert 1 * 2**30 < peak < 20 * 2**30, peak


def test_threads_that_crawl_are_warned_of_once_with_the_setting():
    code = "from dermgan.settings import warn_threads; warn_threads(); warn_threads()"
    core = {min(os.sched_getaffinity(0))}
    pinned = dict(capture_output=True, text=True, preexec_fn=lambda: os.sched_setaffinity(0, core))
    said = subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "3"}, **pinned).stderr
    assert said.count("UserWarning") == 1 and "3 threads on 1 cores" in said and "OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE" in said
    quiet = subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"}, **pinned).stderr
    assert quiet == ""


def test_the_command_warns_before_it_measures():
    words = [sys.executable, "-m", "dermgan.reproduce", "plan", "--profile", "smoke", "--gpus", "3"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "99"})
    assert done.returncode == 2 and "OpenMP starts 99 threads" in done.stderr and "shared by 3 processes" in done.stderr


@pytest.mark.parametrize("told, cores, bound, load, said", [
    ({}, 4, 4, 4.0, None), ({}, 4, 4, 4.1, "OMP_WAIT_POLICY=PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, 4, 4, 9.0, "OMP_WAIT_POLICY=PASSIVE"),
    ({"OMP_WAIT_POLICY": "passive"}, 4, 4, 99.0, None), ({"OMP_NUM_THREADS": "5"}, 4, 4, 0.0, "OMP_NUM_THREADS=4"),
    ({"OMP_NUM_THREADS": "4,2"}, 4, 64, 0.0, None), ({}, 4, 64, 0.0, "OMP_NUM_THREADS=4"), ({"OMP_NUM_THREADS": "x"}, 4, 4, 0.0, None)])
def test_what_is_wrong_with_the_threads(told, cores, bound, load, said):
    found = settings.thread_advice(told, cores, bound, load)
    assert found is None if said is None else said in found
