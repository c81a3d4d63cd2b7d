"""A training step of `quick`'s GAN on one thread and on two, wall-clock milliseconds per image, in turns.

    python benchmarks/gan_threads.py [--repeats 20]
"""
import argparse
import statistics
import time

from common import report

import torch

from dermgan import gan
from dermgan.core import read_profile


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--repeats", type=int, default=20)
    options = words.parse_args()
    p = read_profile("quick")
    systems = {(precision, threads): gan.begin(p, 0, precision) for precision in ("bf16", "fp32") for threads in (1, 2)}
    reals, times = torch.randn(p.gan_batch, 3, p.image_px, p.image_px), {key: [] for key in systems}
    for repeat in range(options.repeats + 2):
        for (precision, threads), t in systems.items():
            torch.set_num_threads(threads)
            t.step, begin = 1, time.perf_counter()
            gan.train_generator(t, p, gan.step_draws(p, 0, repeat))
            gan.train_discriminator(t, p, reals, gan.step_draws(p, 0, repeat))
            if repeat > 1:
                times[precision, threads].append((time.perf_counter() - begin) * 1000 / p.gan_batch)
    ms = {key: statistics.median(values) for key, values in times.items()}
    for precision in ("bf16", "fp32"):
        one, two = ms[precision, 1], ms[precision, 2]
        report(f"gan_one_thread_{precision}", one / two, "of the time on two threads, quick's GAN", 1,
               one_ms=round(one, 1), two_ms=round(two, 1), repeats=options.repeats)


if __name__ == "__main__":
    main()
