"Seconds to factorize a 512 px generator (16 style inputs, w of length 512), both variants. Bound: 1 s."
import torch

from common import report, seconds
from dermgan.factorize import factorize
from dermgan.stylegan2 import Generator

torch.manual_seed(0)
g = Generator(512).eval().requires_grad_(False)
each = {variant: seconds(lambda: factorize(g, "all", variant)) for variant in ("sefa", "raw")}
report("factorize", max(each.values()), "s", 1.0, **each)
