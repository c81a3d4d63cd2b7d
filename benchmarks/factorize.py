"""Closed-form factorization of a 512 px generator (16 style inputs, w of length 512), both variants, beside rosinality's, in turns.

rosinality's `closed_form_factorization.py` is one line, torch.svd of the concatenated style weights; here it gets the same weights. Bound: 1 s.

    python benchmarks/factorize.py [--repeats 5]
"""
import argparse

from common import report, turns, versus

import torch

from dermgan.factorize import factorize, style_rows
from dermgan.stylegan2 import Generator


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--repeats", type=int, default=5)
    options = words.parse_args()
    torch.manual_seed(0)
    g = Generator(512).eval().requires_grad_(False)
    weights = style_rows(g, "all", "raw").float()
    works = {variant: lambda variant=variant: factorize(g, "all", variant) for variant in ("sefa", "raw")}
    took = turns(works | {"svd": lambda: torch.svd(weights).V}, options.repeats)
    slower = max(("sefa", "raw"), key=lambda variant: sorted(took[variant])[options.repeats // 2])
    report("factorize", took[slower], "CPU s", 1.0, variant=slower, rows=len(weights))
    one, other = works["raw"]().vectors[:10], torch.svd(weights.double()).V.T[:10]
    versus("factorize_to_rosinality", took["raw"], took["svd"], "rosinality", "CPU s", 1.0, variant="raw",
           difference=float(1 - (one * other).sum(1).abs().min()))


if __name__ == "__main__":
    main()
