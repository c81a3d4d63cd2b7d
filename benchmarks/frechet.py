"""Arithmetic of the Frechet distance at 2048 dimensions, from features to number, beside pytorch-fid: CPU seconds, in turns.

pytorch-fid is used where it can be imported; else its formula stands here: covariances by numpy, scipy's general matrix root.

    python benchmarks/frechet.py [--repeats 3] [--peer]     --peer also times the matrix root (half a minute and more)
"""
import argparse
import time

from common import report, samples, turns, versus

import numpy as np


def features(n, d, seed):
    "Features with the decaying spectrum of real ones."
    import torch
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=draw, dtype=torch.float64) * torch.logspace(0, -2, d, dtype=torch.float64) + 0.01 * seed


def by_root(mean, covariance, other_mean, other_covariance):
    "The usual way: a general matrix square root."
    from scipy import linalg
    root = linalg.sqrtm(covariance @ other_covariance).real
    return ((mean - other_mean) ** 2).sum() + np.trace(covariance) + np.trace(other_covariance) - 2 * np.trace(root)


def public():
    "The distance from statistics, and whose it is."
    try:
        from pytorch_fid.fid_score import calculate_frechet_distance
        return calculate_frechet_distance, "pytorch-fid"
    except ImportError:
        return by_root, "pytorch-fid's formula"


def main():
    "Time both forms; the bounds are half of pytorch-fid's time, and 12 CPU seconds."
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--repeats", type=int, default=3)
    words.add_argument("--peer", action="store_true")
    options = words.parse_args()
    from dermgan.metrics import frechet_distance
    a, b = features(4096, 2048, 1), features(4096, 2048, 2)
    works, found, size = {"ours": lambda: found.append(frechet_distance(a, b))}, [], {"n": 4096, "d": 2048}
    if options.peer:
        (distance, name), theirs = public(), []
        statistics = lambda x: (x.mean(0), np.cov(x, rowvar=False))
        works[name] = lambda: theirs.append(float(distance(*statistics(a.numpy()), *statistics(b.numpy()))))
    took = turns(works, options.repeats)
    report("frechet_2048", took["ours"], "CPU s", 12, **size)
    if options.peer:
        versus("frechet_to_peer", took["ours"], took[name], name, "CPU s", 0.5, **size,
               difference=abs(found[0] - theirs[0]) / theirs[0])
    report("frechet_2048_few", samples(lambda: frechet_distance(a[:256], b[:256]), 5, time.process_time), "CPU s", 1, n=256, d=2048)


if __name__ == "__main__":
    main()
