"""Arithmetic of the Frechet distance at 2048 dimensions: CPU seconds for many samples and for few, beside scipy's matrix root.

python benchmarks/frechet.py [--peer]     --peer also times scipy.linalg.sqrtm (half a minute and more)
"""
import argparse
import time

from common import report, seconds


def features(n, d, seed):
    "Features with the decaying spectrum of real ones."
    import torch
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=draw, dtype=torch.float64) * torch.logspace(0, -2, d, dtype=torch.float64) + 0.01 * seed


def by_root(a, b):
    "The usual way: covariances, then a general matrix square root."
    import numpy as np
    from scipy import linalg
    one, two = np.cov(a.T), np.cov(b.T)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + two - 2 * linalg.sqrtm(one @ two).real))


def main():
    "Time both forms; the bound is the issue's 12 CPU seconds."
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--peer", action="store_true")
    peer = words.parse_args().peer
    from dermgan.metrics import frechet_distance
    a, b = features(4096, 2048, 1), features(4096, 2048, 2)
    found = frechet_distance(a, b)
    more = {"n": 4096, "d": 2048}
    if peer:
        begin = time.process_time()
        other = by_root(a.numpy(), b.numpy())
        more |= {"scipy_sqrtm_s": round(time.process_time() - begin, 2), "relative_difference": abs(other - found) / other}
    report("frechet_2048", seconds(lambda: frechet_distance(a, b), 3, time.process_time), "CPU s", 12, **more)
    report("frechet_2048_few", seconds(lambda: frechet_distance(a[:256], b[:256]), 5, time.process_time), "CPU s", 1, n=256, d=2048)


if __name__ == "__main__":
    main()
