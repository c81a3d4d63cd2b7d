"""HyperStyle in images a second at 64 px with T = 5, the network of `ham`; beside e4e and the projector; and the memory of its training.

python benchmarks/inversion.py [--run runs/ham-...-s0]   (a run's trained networks; without it the same shapes untrained)
"""
import argparse
import copy
import resource
import statistics
from pathlib import Path

from common import report, samples, seconds

import torch

from dermgan.core import read_run, rng
from dermgan.hyperstyle import Nets, invert, open_nets
from dermgan.hypertrain import Frozen, Losses, begin_hyper, convolution_precision, hyper_step
from dermgan.metrics import open_lpips
from dermgan.settings import read_profile
from dermgan.stylegan2 import Generator
from dermgan.trunk import Encoder


def untrained(p) -> Nets:
    "Networks of the profile's shapes."
    g = Generator(p.image_px, p.z_dim, p.w_dim, p.channel_base, p.channel_max, p.mapping_layers).eval().requires_grad_(False)
    encoder = Encoder(p.image_px, g.num_ws, p.w_dim, p.enc_width, p.enc_units).eval().requires_grad_(False)
    hyper = begin_hyper(p, g, 0).hyper.eval().requires_grad_(False)
    fast = copy.deepcopy(g)
    fast.synthesis.compute_dtype = torch.bfloat16 if convolution_precision(p) == "bf16" else None
    return Nets(g, None, encoder, hyper, p.hyper_passes, p.hyper_start, None, fast)


def training_peak(p, nets: Nets) -> float:
    "Peak resident memory in MiB after a full training step of five passes with LPIPS, the whole process."
    t, pixels = begin_hyper(p, nets.g, 0), torch.randint(0, 256, (64, 3, p.image_px, p.image_px), dtype=torch.uint8)
    few = type("Few", (list,), {"batch": staticmethod(lambda places: pixels[places])})(range(64))
    t.step = round(p.hyper_kimg * 1000 / p.hyper_batch) - 2
    frozen = Frozen(nets.fast, nets.encoder, Losses(p.hyper_l2_weight, p.hyper_lpips_weight, open_lpips(None)))
    hyper_step(t, p, frozen, few, 0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--run", type=Path)
    options = words.parse_args()
    run = read_run(options.run) if options.run else None
    p = run.profile if run else read_profile("ham")
    nets = open_nets(run)._replace(lpips=None) if run else untrained(p)
    images = torch.rand(64, 3, p.image_px, p.image_px, generator=rng(0, "images")) * 2 - 1
    facts, rates = {"n": len(images), "image_px": p.image_px, "networks": "trained" if run else "untrained, of the profile's shapes"}, {}
    for method, bound in (("hyperstyle", 20.0), ("e4e", None)):
        invert(images, method, nets=nets, batch=32)
        each = [len(images) / s for s in samples(lambda: invert(images, method, nets=nets, batch=32))]
        rates[method] = statistics.median(each)
        report(f"invert_{method}", each, "images/s", bound, "higher", **facts)
    search = lambda steps: seconds(lambda: invert(images[:32], "projector", nets=nets, space="w", steps=steps), 3) / 32
    each = 500 * (search(15) - search(5)) / 10
    report("invert_projector_w", 1 / each, "images/s", None, "higher", steps="500, from the difference of 15 and 5",
           times_hyperstyle=round(rates["hyperstyle"] * each, 1), times_e4e=round(rates["e4e"] * each, 1), **facts)
    report("hyperstyle_training_memory", training_peak(p, nets), "MiB", 6144.0, **facts)


if __name__ == "__main__":
    main()
