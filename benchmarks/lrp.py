"""Relevance of DenseNet121 at 224 px against forward and backward, batch 8; reference samples at 64 px, scaled to 10,000."""
import resource
import tempfile
import time
from pathlib import Path

from common import report


def propagation(repeats: int = 3):
    "CPU seconds of LRP over those of forward and backward, as training has them, taken in turn."
    import torch
    from dermgan.allot import standardise
    from dermgan.classify import build
    from dermgan.lrp import attribute
    model = build("densenet121").eval()
    images, targets = torch.rand(8, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.arange(8) % 7

    def train():
        x = standardise(images).contiguous(memory_format=torch.channels_last).requires_grad_()
        model(x)[torch.arange(8), targets].sum().backward()
        model.zero_grad()

    times = {train: [], attribute: []}
    for _ in range(repeats + 1):
        for work, call in ((train, train), (attribute, lambda: attribute(model, images, targets))):
            begin = time.process_time()
            call()
            times[work].append(time.process_time() - begin)
    plain, relevance = (min(times[work][1:]) for work in (train, attribute))
    report("lrp_densenet121_224", [b / a for a, b in zip(times[train][1:], times[attribute][1:])], "times forward and backward, an image, batch 8", 4,
           forward_backward_cpu_ms_an_image=round(125 * plain, 1), lrp_cpu_ms_an_image=round(125 * relevance, 1))


def references(count: int = 768):
    "Minutes for 10,000 images on 2 cores, from the CPU seconds of fewer; peak memory of a pass and of a doubled one."
    import torch
    from dermgan.classify import build
    from dermgan.references import collect
    from dermgan.store import Images, pack_images
    pictures = (torch.rand(count, 64, 64, 3, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8).numpy()
    names, model, peaks = [f"image {i}" for i in range(count)], build("densenet121").eval(), []
    with tempfile.TemporaryDirectory() as folder:
        for part in (count // 3, count):
            store = Path(folder) / f"store {part}"
            pack_images(store, list(pictures[:part]), names[:part], [i % 7 for i in range(part)], names[:part],
                        tuple("abcdefg"), 64)
            begin = time.process_time()
            collect(Path(folder) / f"found {part}", model, Images(store))
            spent = time.process_time() - begin
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    report("references_64", spent / count * 10000 / 60 / 2, "minutes for 10,000 images on 2 cores", 15,
           peak_mib=peaks[1], peak_mib_of_a_third=peaks[0], images=count)


if __name__ == "__main__":
    references()
    propagation()
