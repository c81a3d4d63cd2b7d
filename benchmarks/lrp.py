"""Relevance of DenseNet121 at 224 px against forward and backward, batch 8; reference samples at 64 px, scaled to 10,000."""
import resource
import tempfile
from pathlib import Path

from common import report, seconds


def propagation():
    "The time of LRP, an image, over that of forward and backward, as training has them."
    import torch
    from dermgan.allot import standardise
    from dermgan.classify import build
    from dermgan.lrp import attribute
    model = build("densenet121").eval()
    images, targets = torch.rand(8, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.arange(8) % 7

    def train():
        x = standardise(images).contiguous(memory_format=torch.channels_last).requires_grad_()
        logits = model(x)
        logits[torch.arange(8), targets].sum().backward()
        model.zero_grad()

    train()
    attribute(model, images, targets)
    plain, relevance = seconds(train), seconds(lambda: attribute(model, images, targets))
    report("lrp_densenet121_224", relevance / plain, "times forward and backward, an image, batch 8", 4,
           forward_backward_ms_an_image=round(125 * plain, 1), lrp_ms_an_image=round(125 * relevance, 1))


if __name__ == "__main__":
    propagation()
