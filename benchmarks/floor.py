"""The floor of a training step: operations and bytes, counted on tensors without memory. Nothing is timed.

Operations are those of convolutions and matrix products in our step (a multiplication and an addition are two). Bytes are the least that these
products must move if each reads its operands and writes its result once and all else is fused into them, plus optimiser and average: 2 bytes a
number in the products, 4 in the optimiser.

    python benchmarks/floor.py [--px 64] [--base 16384] [--batch 8]      without options: 64 px and 512 px, as in NOTES.md
"""
import argparse
import dataclasses

from common import RESULTS  # noqa: F401  (puts the repository on the path)

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Traffic(TorchDispatchMode):
    "Counts operations of products, the numbers that these read and write, and those that all operations do."

    def __init__(self):
        super().__init__()
        self.flops = self.products = self.all = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.is_view:  # moves nothing
            return out
        count = sum(t.numel() for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor))
        self.all += count
        if formula := flop_registry.get(op._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
            self.products += count
        return out


def count(work) -> tuple[float, float, float]:
    "GFLOP, and 10**9 numbers moved by products and by all operations, in the plain form of each layer."
    from dermgan.convolution import plain_form
    with Traffic() as traffic, plain_form():
        work()
    return traffic.flops / 1e9, traffic.products / 1e9, traffic.all / 1e9


def step(px: int, base: int, batch: int) -> dict:
    "GFLOP and GB of a step per image, part by part weighted by how often it runs."
    from dermgan import gan
    from dermgan.core import rng
    from dermgan.settings import read_profile
    p = dataclasses.replace(read_profile("paper"), image_px=px, channel_base=base, gan_batch=batch)
    with torch.device("meta"):
        t = gan.begin(p, 0, "fp32", "meta")
    reals, draw = torch.empty(batch, 3, px, px, device="meta"), rng(0, "floor")
    fake = lambda n: t.g.synthesis(gan.mixed_codes(t.g, n, t.g.num_ws, draw), "random", draw)

    def path():
        ws = gan.mixed_codes(t.g, max(batch // 2, 1), t.g.num_ws, draw)
        t.forms.lengths(t.g.synthesis, ws, draw).mean().backward()

    def generator():
        t.d.requires_grad_(False)
        gan.generator_loss(t.d(fake(batch))).backward()
        t.d.requires_grad_(True)

    def discriminator():
        with torch.no_grad():
            images = fake(batch)
        gan.discriminator_loss(t.d(images), t.d(reals)).backward()
    parts = {"generator": (generator, 1), "path length": (path, 1 / 4), "discriminator": (discriminator, 1),
             "R1": (lambda: t.forms.r1(t.d, lambda x: x, reals, 1.0).backward(), 1 / 16)}
    sums = [sum(weight * n for (_, weight), n in zip(parts.values(), column)) / batch
            for column in zip(*(count(work) for work, _ in parts.values()))]
    sizes = [sum(q.numel() for q in net.parameters()) for net in (t.g, t.d)]
    # Adam reads weight, gradient and two moments and writes three; the average reads two and writes one
    moved = (7 * (sizes[0] * 1.25 + sizes[1] * 1.0625) + 3 * sizes[0]) / 1e9 / batch
    return {"px": px, "base": base, "batch": batch, "parameters_m": [round(n / 1e6, 1) for n in sizes], "gflop": round(sums[0], 1),
            "gb_products": round(2 * sums[1], 3), "gb_all_operations": round(2 * sums[2], 3), "gb_optimiser": round(4 * moved, 3)}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--px", type=int)
    words.add_argument("--base", type=int, default=16384)
    words.add_argument("--batch", type=int, default=8)
    o = words.parse_args()
    for px, base, batch in [(o.px, o.base, o.batch)] if o.px else [(64, 16384, 8), (64, 2048, 8), (128, 32768, 32), (512, 32768, 16)]:
        print("per image:", step(px, base, batch))


if __name__ == "__main__":
    main()
