"""A step of the optimisation projector at 64 px, base 16384, in W with noise planes, beside rosinality's and NVlabs' loops, in turns.

All three take LPIPS (AlexNet, the same weights) as the perceptual distance, because the VGG16 of the peers' own scripts would hide what is
compared; the peers' loops stand restated here around their own generators. NVlabs' inverts one image at a time, so ours does too beside it.

    python benchmarks/projection.py [--repeats 5] [--px 64] [--base 16384] --peer DIR [--peer DIR]
"""
import argparse
import math
from types import SimpleNamespace

from common import peers, report, turns, versus

import torch

STEPS = 3


def rate(t: float) -> float:
    "Their schedule of the learning rate."
    return 0.1 * min(1.0, t / 0.05) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / 0.25)))


def ours(g, targets, lpips):
    "Our search, features of the targets and all."
    from dermgan.invert import Search, search_batch
    return lambda: search_batch(g, targets, g.w_avg.expand(len(targets), -1), 0.4, lpips, Search(space="w", steps=STEPS))


def rosinality_loop(g, targets, lpips):
    "The loop of their projector.py: all images and noises in one Adam, its default W."
    def penalty(noises):
        loss = 0
        for noise in noises:
            size = noise.shape[2]
            while True:
                loss = loss + sum((noise * torch.roll(noise, 1, axis)).mean().pow(2) for axis in (3, 2))
                if size <= 8:
                    break
                noise = noise.reshape([-1, 1, size // 2, 2, size // 2, 2]).mean([3, 5])
                size //= 2
        return loss

    def run():
        noises = [n.repeat(len(targets), 1, 1, 1).normal_().requires_grad_() for n in g.make_noise()]
        latent = torch.zeros(len(targets), 512, requires_grad=True)
        adam = torch.optim.Adam([latent, *noises], lr=0.1)
        for i in range(STEPS):
            adam.param_groups[0]["lr"] = rate(i / STEPS)
            image, _ = g([latent + torch.randn_like(latent) * 0.02], input_is_latent=True, noise=noises)
            loss = lpips(image, targets).sum() + 1e5 * penalty(noises)
            adam.zero_grad()
            loss.backward()
            adam.step()
            for noise in noises:
                noise.data.add_(-noise.mean()).div_(noise.std())
    return run


def nvlabs_loop(g, targets, lpips):
    "The loop of their projector.py, one image."
    def run():
        planes = {k: v for k, v in g.synthesis.named_buffers() if "noise_const" in k}
        w = torch.zeros(1, 1, 512, requires_grad=True)
        adam = torch.optim.Adam([w, *planes.values()], betas=(0.9, 0.999), lr=0.1)
        for plane in planes.values():
            plane[:] = torch.randn_like(plane)
            plane.requires_grad_()
        for step in range(STEPS):
            adam.param_groups[0]["lr"] = rate(step / STEPS)
            image = g.synthesis((w + torch.randn_like(w) * 0.02).repeat([1, g.mapping.num_ws, 1]), noise_mode="const")
            loss = lpips(image, targets).sum()
            for noise in (plane[None, None] for plane in planes.values()):
                while True:
                    loss = loss + 1e5 * sum((noise * torch.roll(noise, 1, axis)).mean() ** 2 for axis in (3, 2))
                    if noise.shape[2] <= 8:
                        break
                    noise = torch.nn.functional.avg_pool2d(noise, 2)
            adam.zero_grad(set_to_none=True)
            loss.backward()
            adam.step()
            with torch.no_grad():
                for plane in planes.values():
                    plane -= plane.mean()
                    plane *= plane.square().mean().rsqrt()
        for plane in planes.values():
            plane.requires_grad_(False)
    return run


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--repeats", type=int, default=5)
    words.add_argument("--px", type=int, default=64)
    words.add_argument("--base", type=int, default=16384)
    words.add_argument("--peer", action="append", default=[], metavar="DIR")
    o = words.parse_args()
    from dermgan.metrics import open_lpips
    from dermgan.stylegan2 import Generator
    from gan_step import nvlabs_networks, rosinality_networks
    lpips, sizes = open_lpips(None), SimpleNamespace(px=o.px, base=o.base, device="cpu")
    torch.manual_seed(0)
    g, images = Generator(o.px, channel_base=o.base).eval().requires_grad_(False), torch.rand(4, 3, o.px, o.px) * 2 - 1
    works, counts = {"batch": ours(g, images, lpips), "single": ours(g, images[:1], lpips)}, {"batch": 4, "single": 1}
    makers = {"rosinality": (rosinality_networks, rosinality_loop, 4), "nvlabs": (nvlabs_networks, nvlabs_loop, 1)}
    for name, (networks, loop, count) in makers.items():
        if (folder := peers(name, o.peer)) and (nets := networks(folder, sizes)):
            works[name], counts[name] = loop(nets[0].eval().requires_grad_(False), images[:count], lpips.net), count
    took = turns(works, o.repeats)
    each = {name: [1000 * s / STEPS / counts[name] for s in times] for name, times in took.items()}
    facts = {"px": o.px, "base": o.base, "perceptual": "AlexNet for all"}
    report("projector_step", each["batch"], "CPU-ms a step and image, batch 4, fp32", **facts)
    for name, mine in (("rosinality", "batch"), ("nvlabs", "single")):
        if name in each:
            versus(f"projector_to_{name}", each[mine], each[name], name, "CPU-ms a step and image", 1.0, batch=counts[name], **facts)


if __name__ == "__main__":
    main()
