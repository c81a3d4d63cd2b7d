"""One training step at 64 px, channel base 16384, batch 8: CPU-milliseconds per image, both threads summed.

A step is the generator, the discriminator, R1 every 16th and path length every 4th time. Each part is timed by itself and weighted by
how often it runs; the implementations take turns, part by part, so that a busy machine is busy for all of them.

    python benchmarks/gan_step.py [--repeats 3] [--peer DIR]...    DIR: a checkout of NVlabs stylegan2-ada-pytorch or rosinality's
"""
import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from common import report

import torch

BATCH, PX = 8, 64
SETTINGS = SimpleNamespace(image_px=PX, z_dim=512, w_dim=512, channel_base=16384, channel_max=512, mapping_layers=8, gan_batch=BATCH,
                           gan_accumulate=1, gan_mixing=0.9, gan_lr=0.002, gan_pl_every=4, gan_pl_weight=2.0, gan_r1_every=16,
                           gan_r1_gamma=1.0, gan_ema_kimg=10.0, gan_ema_ramp=0.05)


def ours(precision: str) -> dict:
    "Part -> (work, share of the steps that run it)."
    from dermgan import gan
    t, reals = gan.begin(SETTINGS, 0, precision), torch.randn(BATCH, 3, PX, PX)

    def generator(step):
        t.step = step
        gan.train_generator(t, SETTINGS, gan.step_draws(SETTINGS, 0, step))

    def discriminator(step):
        t.step = step
        gan.train_discriminator(t, SETTINGS, reals, gan.step_draws(SETTINGS, 0, step))
    return {"generator": (lambda: generator(1), 3 / 4), "generator and path length": (lambda: generator(4), 1 / 4),
            "discriminator": (lambda: discriminator(1), 15 / 16), "discriminator and R1": (lambda: discriminator(16), 1 / 16),
            "average": (lambda: gan.update_average(t, SETTINGS), 1)}


def adam(net, every):
    c = every / (every + 1)
    return torch.optim.Adam(net.parameters(), lr=0.002 * c, betas=(0.0, 0.99**c), eps=1e-8)


def nvlabs(folder: Path) -> dict:
    "NVlabs' own networks and loss class, with the reference operations that a CPU gets."
    sys.path.insert(0, str(folder))
    import dnnlib
    from training.loss import StyleGAN2Loss
    from training.networks import Discriminator, Generator
    shape = dict(channel_base=16384, channel_max=512, num_fp16_res=0)
    g = Generator(z_dim=512, c_dim=0, w_dim=512, img_resolution=PX, img_channels=3, mapping_kwargs=dnnlib.EasyDict(num_layers=8),
                  synthesis_kwargs=dnnlib.EasyDict(**shape)).train()
    d = Discriminator(c_dim=0, img_resolution=PX, img_channels=3, **shape).train()
    ema, loss = copy.deepcopy(g).eval(), StyleGAN2Loss("cpu", g.mapping, g.synthesis, d, r1_gamma=1)
    opts, labels = {"G": adam(g, 4), "D": adam(d, 16)}, torch.zeros(BATCH, 0)
    reals = torch.randn(BATCH, 3, PX, PX)

    def phase(name, interval):
        net = g if name[0] == "G" else d
        opts[name[0]].zero_grad(set_to_none=True)
        g.requires_grad_(net is g), d.requires_grad_(net is d)
        loss.accumulate_gradients(phase=name, real_img=reals, real_c=labels, gen_z=torch.randn(BATCH, 512), gen_c=labels, sync=True, gain=interval)
        opts[name[0]].step()

    def average():
        with torch.no_grad():
            for p_ema, p in zip(ema.parameters(), g.parameters()):
                p_ema.copy_(p.lerp(p_ema, 0.998))
    return {"generator": (lambda: phase("Gmain", 1), 1), "path length": (lambda: phase("Greg", 4), 1 / 4),
            "discriminator": (lambda: phase("Dmain", 1), 1), "R1": (lambda: phase("Dreg", 16), 1 / 16), "average": (average, 1)}


def rosinality(folder: Path) -> dict:
    "rosinality's networks, and the steps of its training script with its own losses' formulas."
    import torch.utils.cpp_extension as extension
    load, extension.load = extension.load, lambda *a, **k: None
    sys.path.insert(0, str(folder))
    import model
    extension.load = load
    g, d = model.Generator(PX, 512, 8, channel_multiplier=1), model.Discriminator(PX, channel_multiplier=1)
    ema, opts = copy.deepcopy(g), {"g": adam(g, 4), "d": adam(d, 16)}
    reals, soft, lengths = torch.randn(BATCH, 3, PX, PX), torch.nn.functional.softplus, {"mean": torch.zeros([])}
    noise = lambda n: list(torch.randn(2, n, 512).unbind(0))

    def step(key, loss):
        (g if key == "g" else d).zero_grad()
        loss.backward()
        opts[key].step()

    def turn(key):
        for name, net in (("g", g), ("d", d)):
            net.requires_grad_(name == key)

    def generator():
        turn("g")
        step("g", soft(-d(g(noise(BATCH))[0])).mean())

    def path_length():
        turn("g")
        images, latents = g(noise(BATCH // 2), return_latents=True)
        (grad,) = torch.autograd.grad((images * torch.randn_like(images) / PX).sum(), latents, create_graph=True)
        length = grad.pow(2).sum(2).mean(1).sqrt()
        mean = lengths["mean"] + 0.01 * (length.mean() - lengths["mean"])
        lengths["mean"] = mean.detach()
        step("g", 8 * (length - mean).pow(2).mean() + 0 * images[0, 0, 0, 0])

    def discriminator():
        turn("d")
        fake = g(noise(BATCH))[0]
        step("d", soft(d(fake)).mean() + soft(-d(reals)).mean())

    def r1():
        turn("d")
        real = reals.clone().requires_grad_()
        logits = d(real)
        (grad,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        step("d", 8 * grad.pow(2).reshape(BATCH, -1).sum(1).mean() + 0 * logits[0].sum())

    def average():
        for p_ema, p in zip(ema.parameters(), g.parameters()):
            p_ema.data.mul_(0.998).add_(p.data, alpha=0.002)
    return {"generator": (generator, 1), "path length": (path_length, 1 / 4), "discriminator": (discriminator, 1), "R1": (r1, 1 / 16),
            "average": (average, 1)}


def peer(folder: str) -> tuple[str, dict]:
    "Name and parts of a checkout."
    folder = Path(folder).resolve()
    if (folder / "training" / "networks.py").is_file():
        return "nvlabs", nvlabs(folder)
    if (folder / "model.py").is_file():
        return "rosinality", rosinality(folder)
    raise SystemExit(f"{folder.name} is a checkout of neither NVlabs stylegan2-ada-pytorch nor rosinality's stylegan2-pytorch")


def measure(systems: dict[str, dict], repeats: int) -> dict[str, dict[str, float]]:
    "CPU-milliseconds per image: the median of each part, after one run that warms up."
    times = {(name, part): [] for name, parts in systems.items() for part in parts}
    for repeat in range(repeats + 1):
        for index in range(5):
            for name, parts in systems.items():
                part = list(parts)[index]
                begin = time.process_time()
                parts[part][0]()
                if repeat:
                    times[name, part].append((time.process_time() - begin) * 1000 / BATCH)
    return {name: {part: statistics.median(times[name, part]) for part in parts} for name, parts in systems.items()}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--repeats", type=int, default=3)
    words.add_argument("--peer", action="append", default=[], metavar="DIR")
    options = words.parse_args()
    systems = {"bf16": ours("bf16"), "fp32": ours("fp32")} | dict(peer(folder) for folder in options.peer)
    parts = measure(systems, options.repeats)
    total = {name: sum(ms * systems[name][part][1] for part, ms in p.items()) for name, p in parts.items()}
    amx, rounded = torch.cpu._is_amx_tile_supported(), {name: {k: round(v) for k, v in p.items()} for name, p in parts.items()}
    for name, bound in (("bf16", 975 if amx else None), ("fp32", 1830)):
        report(f"gan_step_{name}", total[name], "CPU-ms per image", bound, parts=rounded[name], repeats=options.repeats)
    for other in total.keys() - {"bf16", "fp32"}:
        for name, bound in (("bf16", 0.40 if amx else None), ("fp32", 0.75)):
            report(f"gan_step_{name}_to_{other}", total[name] / total[other], f"of {other}'s time", bound if other == "nvlabs" else None,
                   peer_ms=round(total[other]), peer_parts=rounded[other], own_ms=round(total[name]), repeats=options.repeats)


if __name__ == "__main__":
    main()
