"""Lesion attributes: images a second on one core at 64 px."""
import time

from common import report, samples


def main():
    "Measure 256 phantom images; the bound is 200 images a second."
    import torch
    torch.set_num_threads(1)
    from dermgan.attributes import lesion_attributes
    from dermgan.phantom import sample
    images = torch.from_numpy(sample(256, 64).images).float() / 127.5 - 1
    times = samples(lambda: lesion_attributes(images), 5, time.process_time)
    report("lesion_attributes", [256 / s for s in times], "images/s of CPU time, one core", 200, "higher")


if __name__ == "__main__":
    main()
