"""LPIPS of pairs of images beside the `lpips` package, in turns: at 64 px and at 256 px, alone and with its gradient.

Both run the same AlexNet with the same weights: the trunk of DERMGAN_WEIGHTS, or a random one, which changes neither time nor equality.

    python benchmarks/perception.py [--repeats 9]
"""
import argparse
import os
from pathlib import Path

from common import report, turns, versus

import torch


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--repeats", type=int, default=9)
    repeats = words.parse_args().repeats
    from dermgan.metrics import open_lpips
    ours = open_lpips(Path(os.environ["DERMGAN_WEIGHTS"]) if os.environ.get("DERMGAN_WEIGHTS") else None)
    theirs, draw, far = ours.net, torch.Generator().manual_seed(0), []
    for px, count in ((64, 32), (256, 8)):
        x, y = (torch.rand(count, 3, px, px, generator=draw) * 2 - 1 for _ in range(2))

        def distance(net):
            with torch.no_grad():
                return net(x, y).flatten()

        def gradient(net):
            image = x.clone().requires_grad_()
            net(image, y).sum().backward()
            return image.grad

        for name, work in (("lpips", distance), ("lpips_gradient", gradient)):
            one, other = work(ours), work(theirs)
            far.append(float((one - other).abs().max() / other.abs().max()))
            took = turns({"ours": lambda: work(ours), "lpips": lambda: work(theirs)}, repeats, scale=1000 / count)
            versus(f"{name}_{px}", took["ours"], took["lpips"], "lpips", "CPU-ms a pair", 1.0, trunk=ours.name, difference=far[-1])
    report("lpips_difference", max(far[::2]), "largest difference from lpips, relative", 1e-6, trunk=ours.name, of_gradient=max(far[1::2]))


if __name__ == "__main__":
    main()
