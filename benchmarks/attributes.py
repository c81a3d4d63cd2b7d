"""Lesion attributes: images a second on one core at 64 px."""
import time

from common import report, seconds


def main():
    "Measure 256 phantom images; the bound is 200 images a second."
    import torch
    torch.set_num_threads(1)
    from dermgan.attributes import lesion_attributes
    from dermgan.phantom import sample
    images = torch.from_numpy(sample(256, 64).images).float() / 127.5 - 1
    report("lesion_attributes", 256 / seconds(lambda: lesion_attributes(images), 3, time.process_time), "images/s", 200)


if __name__ == "__main__":
    main()
