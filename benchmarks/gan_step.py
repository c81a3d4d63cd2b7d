"""One training step: ours in each precision, NVlabs' and rosinality's, in turns and in one process.

A step is the generator, the discriminator, R1 every 16th and path length every 4th time, and the average. On a CPU each part is timed by itself
and weighted by how often it runs, in CPU-milliseconds per image, all threads summed. On a card (or with --whole) 16 whole steps are timed, so that
a millisecond per image is a second per 1000 images, and each system's own peak of memory stands beside.

    python benchmarks/gan_step.py [--repeats 3] [--peer DIR]...                               64 px, base 16384, batch 8
    python benchmarks/gan_step.py --base 2048 [--peer DIR]...                                 small networks
    python benchmarks/gan_step.py --device cuda --px 512 --base 32768 --batch 16 --peer DIR   on a card

DIR: a checkout of NVlabs stylegan2-ada-pytorch or of rosinality's stylegan2-pytorch. On a card NVlabs' code runs as its own script sets it up: fp16
in the four highest resolutions, its CUDA extensions compiled if the machine has a compiler; the result says which.
"""
import argparse
import copy
import dataclasses
import statistics
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

from common import report, turns, versus

import torch

CYCLE = 16
always, each, others = (lambda s: True), (lambda k: lambda s: s % k == 0), (lambda k: lambda s: s % k != 0)
BOUNDS = {("cpu", 64, 16384): {("bf16", "nvlabs"): 0.28, ("bf16", "rosinality"): 0.14, ("fp32", "nvlabs"): 0.60},
          ("cpu", 64, 2048): {("best", "nvlabs"): 0.50},
          ("cuda", 512, 32768): {"bf16": 12.0, ("bf16", "nvlabs"): 1 / 3, ("memory", "nvlabs"): 1.0},
          ("cuda", 128, 32768): {"bf16": 3.0}}


class Pixels(list):
    "Real images as a store has them."

    def batch(self, places) -> torch.Tensor:
        return torch.stack([self[i] for i in places])


def ours(o, precision: str) -> SimpleNamespace:
    "Parts by name: (work, steps at which it is due); and 16 whole steps."
    from dermgan import gan
    from dermgan.settings import read_profile
    p = dataclasses.replace(read_profile("paper"), image_px=o.px, channel_base=o.base, gan_batch=o.batch, precision=precision, gan_lr=0.002,
                            gan_r1_gamma=1.0, gan_ema_kimg=10.0, gan_crop=1.0)
    t, reals = gan.begin(p, 0, precision, o.device), torch.randn(o.batch, 3, o.px, o.px).to(o.device)
    images = Pixels(torch.randint(0, 256, (2 * o.batch, 3, o.px, o.px), dtype=torch.uint8))

    def part(work, step, *more):
        t.step = step
        work(t, p, *more, gan.step_draws(p, 0, step))
    generator, discriminator = (lambda s: part(gan.train_generator, s)), (lambda s: part(gan.train_discriminator, s, reals))
    parts = {"generator": (lambda: generator(1), others(4)), "generator and path length": (lambda: generator(4), each(4)),
             "discriminator": (lambda: discriminator(1), others(16)), "discriminator and R1": (lambda: discriminator(16), each(16)),
             "average": (lambda: gan.update_average(t, p), always)}
    return SimpleNamespace(parts=parts, cycle=lambda: [gan.train_step(t, p, images, 0) for _ in range(CYCLE)], says=lambda: "")


def adam(net, every):
    c = every / (every + 1)
    return torch.optim.Adam(net.parameters(), lr=0.002 * c, betas=(0.0, 0.99**c), eps=1e-8)


def in_turn(parts: dict):
    "16 whole steps from parts."
    return lambda: [work() for step in range(CYCLE) for work, due in parts.values() if due(step)]


def compiled(operations) -> bool:
    "Try to build one CUDA extension, once: a failed build would otherwise be tried again at every call."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = operations._init()
    operations._inited = True
    return built


def nvlabs_networks(folder: Path, o):
    "NVlabs' generator and discriminator, as its training script sets them up for the device."
    import torch.utils.cpp_extension as extension
    load = extension.load

    def kept(*args, name, **more):
        sys.modules[name] = load(*args, name=name, **more)
        return sys.modules[name]
    extension.load = kept
    sys.path.insert(0, str(folder))
    import dnnlib
    from torch_utils.ops import bias_act, conv2d_gradfix, upfirdn2d
    from training.networks import Discriminator, Generator
    shape, says = dict(channel_base=o.base, channel_max=512, num_fp16_res=0), "reference ops"
    if o.device != "cpu":
        shape |= dict(num_fp16_res=4, conv_clamp=256)
        conv2d_gradfix.enabled = torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        says = {2: "CUDA extensions", 1: "one CUDA extension of two"}.get(sum(compiled(m) for m in (bias_act, upfirdn2d)), says)
    g = Generator(z_dim=512, c_dim=0, w_dim=512, img_resolution=o.px, img_channels=3, mapping_kwargs=dnnlib.EasyDict(num_layers=8),
                  synthesis_kwargs=dnnlib.EasyDict(**shape)).train().to(o.device)
    d = Discriminator(c_dim=0, img_resolution=o.px, img_channels=3, epilogue_kwargs=dnnlib.EasyDict(mbstd_group_size=4), **shape)
    return g, d.train().to(o.device), says


def nvlabs(folder: Path, o) -> SimpleNamespace:
    "NVlabs' own networks and loss class, stepped as its training loop does."
    g, d, says = nvlabs_networks(folder, o)
    from training.loss import StyleGAN2Loss
    ema, loss = copy.deepcopy(g).eval(), StyleGAN2Loss(o.device, g.mapping, g.synthesis, d, r1_gamma=1)
    opts, labels = {"G": adam(g, 4), "D": adam(d, 16)}, torch.zeros(o.batch, 0, device=o.device)
    reals = torch.randn(o.batch, 3, o.px, o.px).to(o.device)

    def phase(name, interval):
        net = g if name[0] == "G" else d
        opts[name[0]].zero_grad(set_to_none=True)
        g.requires_grad_(net is g), d.requires_grad_(net is d)
        loss.accumulate_gradients(phase=name, real_img=reals, real_c=labels, gen_z=torch.randn(o.batch, 512, device=o.device),
                                  gen_c=labels, sync=True, gain=interval)
        for q in net.parameters():
            if q.grad is not None:
                torch.nan_to_num(q.grad, nan=0, posinf=1e5, neginf=-1e5, out=q.grad)
        opts[name[0]].step()

    def average():
        with torch.no_grad():
            for p_ema, p in zip(ema.parameters(), g.parameters()):
                p_ema.copy_(p.lerp(p_ema, 0.998))
            for b_ema, b in zip(ema.buffers(), g.buffers()):
                b_ema.copy_(b)
    parts = {"generator": (lambda: phase("Gmain", 1), always), "path length": (lambda: phase("Greg", 4), each(4)),
             "discriminator": (lambda: phase("Dmain", 1), always), "R1": (lambda: phase("Dreg", 16), each(16)), "average": (average, always)}
    return SimpleNamespace(parts=parts, cycle=in_turn(parts), says=lambda: says)


def rosinality_networks(folder: Path, o):
    "rosinality's generator and discriminator; on a CPU without its CUDA extensions, which are not used there."
    import torch.utils.cpp_extension as extension
    load = extension.load
    if o.device == "cpu":
        extension.load = lambda *a, **k: None
    sys.path.insert(0, str(folder))
    import model
    extension.load, width = load, o.base // 16384
    if o.base not in (16384, 32768):
        print(f"rosinality's networks have channel base 16384 or 32768, not {o.base}: left out", file=sys.stderr)
        return None
    return (model.Generator(o.px, 512, 8, channel_multiplier=width).to(o.device),
            model.Discriminator(o.px, channel_multiplier=width).to(o.device))


def rosinality(folder: Path, o) -> SimpleNamespace | None:
    "rosinality's networks, and the steps of its training script with its own losses' formulas."
    if not (nets := rosinality_networks(folder, o)):
        return None
    g, d = nets
    ema, opts = copy.deepcopy(g), {"g": adam(g, 4), "d": adam(d, 16)}
    reals, lengths = torch.randn(o.batch, 3, o.px, o.px).to(o.device), {"mean": torch.zeros([], device=o.device)}
    noise, soft = (lambda n: list(torch.randn(2, n, 512, device=o.device).unbind(0))), torch.nn.functional.softplus

    def step(key, loss):
        (g if key == "g" else d).zero_grad()
        loss.backward()
        opts[key].step()

    def turn(key):
        for name, net in (("g", g), ("d", d)):
            net.requires_grad_(name == key)

    def generator():
        turn("g")
        step("g", soft(-d(g(noise(o.batch))[0])).mean())

    def path_length():
        turn("g")
        images, latents = g(noise(max(1, o.batch // 2)), return_latents=True)
        (grad,) = torch.autograd.grad((images * torch.randn_like(images) / o.px).sum(), latents, create_graph=True)
        length = grad.pow(2).sum(2).mean(1).sqrt()
        mean = lengths["mean"] + 0.01 * (length.mean() - lengths["mean"])
        lengths["mean"] = mean.detach()
        step("g", 8 * (length - mean).pow(2).mean() + 0 * images[0, 0, 0, 0])

    def discriminator():
        turn("d")
        fake = g(noise(o.batch))[0]
        step("d", soft(d(fake)).mean() + soft(-d(reals)).mean())

    def r1():
        turn("d")
        real = reals.clone().requires_grad_()
        logits = d(real)
        (grad,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        step("d", 8 * grad.pow(2).reshape(o.batch, -1).sum(1).mean() + 0 * logits[0].sum())

    def average():
        for p_ema, p in zip(ema.parameters(), g.parameters()):
            p_ema.data.mul_(0.998).add_(p.data, alpha=0.002)
    parts = {"generator": (generator, always), "path length": (path_length, each(4)), "discriminator": (discriminator, always),
             "R1": (r1, each(16)), "average": (average, always)}
    return SimpleNamespace(parts=parts, cycle=in_turn(parts), says=lambda: "reference ops" if o.device == "cpu" else "CUDA extensions")


def peer(folder: str, o) -> tuple[str, SimpleNamespace | None]:
    "Name and system of a checkout."
    folder = Path(folder).resolve()
    if (folder / "training" / "networks.py").is_file():
        return "nvlabs", nvlabs(folder, o)
    if (folder / "closed_form_factorization.py").is_file():
        return "rosinality", rosinality(folder, o)
    raise SystemExit(f"{folder.name} is a checkout of neither NVlabs stylegan2-ada-pytorch nor rosinality's stylegan2-pytorch")


def share(due) -> float:
    "Of the steps that run a part."
    return sum(due(step) for step in range(CYCLE)) / CYCLE


def by_parts(systems: dict, o) -> tuple[dict, dict]:
    "CPU-milliseconds per image of a step, turn by turn; and of each part, medians."
    works = {(name, part): s.parts[part][0] for index in range(5) for name, s in systems.items() for part in [list(s.parts)[index]]}
    took = turns(works, o.repeats, scale=1000 / o.batch)
    step = {name: [sum(share(due) * took[name, part][k] for part, (_, due) in s.parts.items()) for k in range(o.repeats)]
            for name, s in systems.items()}
    return step, {name: {part: round(statistics.median(took[name, part]), 1) for part in s.parts} for name, s in systems.items()}


def clock_of(o):
    "CPU seconds, or wall-clock seconds once the card has finished."
    def wall():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time if o.device == "cpu" else wall


def open_systems(makers: dict, o) -> tuple[dict, dict]:
    "Build and warm each system by itself; on a card also its peak of memory in MiB, as if it were alone."
    systems, peak, cuda = {}, {}, o.device != "cpu"
    for name, make in makers.items():
        before = torch.cuda.memory_allocated() if cuda else 0
        name, system = make()
        if system is None:
            continue
        if cuda:
            system.cycle()
            torch.cuda.reset_peak_memory_stats()
            system.cycle()
            torch.cuda.synchronize()
            peak[name] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
        systems[name] = system
    return systems, peak


def words():
    "The command's options."
    w = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    w.add_argument("--repeats", type=int, default=3)
    w.add_argument("--peer", action="append", default=[], metavar="DIR")
    w.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    w.add_argument("--px", type=int, default=64)
    w.add_argument("--base", type=int, default=16384, help="channel base: at most base / px channels at px, never above 512")
    w.add_argument("--batch", type=int, default=8)
    w.add_argument("--precision", action="append", choices=["bf16", "fp32"], help="default: both on a CPU, bf16 on a card")
    w.add_argument("--whole", action="store_true", help="time 16 whole steps on a CPU too")
    return w


def main() -> None:
    o = words().parse_args()
    if o.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No CUDA card is here.\nPyTorch sees none.\nRun without --device, or on a machine with one.")
    precisions = o.precision or (["bf16", "fp32"] if o.device == "cpu" else ["bf16"])
    makers = {k: lambda k=k: (k, ours(o, k)) for k in precisions} | {folder: lambda f=folder: peer(f, o) for folder in o.peer}
    systems, peak = open_systems(makers, o)
    if o.device == "cpu" and not o.whole:
        step, parts = by_parts(systems, o)
    else:
        step = turns({name: s.cycle for name, s in systems.items()}, o.repeats, clock_of(o), 1000 / (CYCLE * o.batch))
        parts = {name: None for name in systems}
    write(o, precisions, systems, step, parts, peak)


def write(o, precisions: list[str], systems: dict, step: dict, parts: dict, peak: dict) -> None:
    "Report each precision, its share of each peer's time, and the best precision's."
    amx = o.device != "cpu" or torch.cpu._is_amx_tile_supported()
    bounds, best = BOUNDS.get((o.device, o.px, o.base), {}), min(precisions, key=lambda k: statistics.median(step[k]))
    usual = (o.device, o.px, o.base, o.batch) == ("cpu", 64, 16384, 8)
    stem = "gan_step" if usual else f"gan_step_{o.px}_{o.base}" + ("" if o.device == "cpu" else "_cuda")
    unit = "CPU-ms per image" if o.device == "cpu" else "s/kimg"
    facts = {"px": o.px, "base": o.base, "batch": o.batch, "device": o.device}
    for name in precisions:
        more = {"parts": parts[name]} if parts[name] else {}
        report(f"{stem}_{name}", step[name], unit, bounds.get(name), **more, **facts, **({"peak_mib": peak[name]} if peak else {}))
    for other in systems.keys() - set(precisions):
        more = {"peer_ran": systems[other].says(), "peer_parts": parts[other]}
        for name in (*precisions, "best"):
            bound, key = bounds.get((name, other)), best if name == "best" else name
            if name != "best" or bound:
                versus(f"{stem}_{name}_to_{other}", step[key], step[other], other, unit, bound if amx or key != "bf16" else None,
                       precision=key, **facts, **more)
        if peak:
            report(f"{stem}_memory_to_{other}", peak[best] / peak[other], f"of {other}'s peak memory", bounds.get(("memory", other)),
                   device=o.device, peer=other, ours_value=peak[best], peer_value=peak[other], each="MiB", precision=best, px=o.px, base=o.base,
                   batch=o.batch, peer_ran=systems[other].says())


if __name__ == "__main__":
    main()
