"""Distances against formulas written a second time, slower; lesion attributes against the phantom's truth."""
import hashlib
import math
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import linalg
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from dermgan import attributes, metrics
from dermgan.core import DataMissing, DataRefused, import_torchvision, rng, save_weights

WEIGHTS = Path(os.environ["DERMGAN_WEIGHTS"]) if os.environ.get("DERMGAN_WEIGHTS") else None
needs_trunk = pytest.mark.skipif(not metrics.trunk_file(WEIGHTS, "alexnet"), reason="DERMGAN_WEIGHTS has no AlexNet trunk")
DATA = Path(os.environ.get("DERMGAN_DATA") or "absent") / "HAM10000"


def draw(*shape, name="x"):
    return torch.randn(*shape, generator=rng(0, "test metrics", name), dtype=torch.float64)


def images(n=4, px=64, name="images"):
    return torch.rand(n, 3, px, px, generator=rng(0, "test metrics", name)) * 2 - 1


def frechet_by_root(a, b, ddof=1):
    "The textbook formula with scipy's general matrix root."
    a, b = a.numpy(), b.numpy()
    one, two = np.cov(a.T, ddof=ddof), np.cov(b.T, ddof=ddof)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + two - 2 * linalg.sqrtm(one @ two).real))


# C7: the Frechet distance

@pytest.mark.parametrize("n, m, d", [(300, 200, 24), (300, 16, 24), (16, 300, 24), (400, 400, 1), (64, 64, 64)])
@pytest.mark.parametrize("ddof", [0, 1])
def test_frechet_agrees_with_the_matrix_root(n, m, d, ddof):
    a, b = draw(n, d, name="a") * 2 + 1, draw(m, d, name="b") @ draw(d, d, name="mix") / d**0.5
    expected = ((a.mean() - b.mean()) ** 2 + (a.std(correction=ddof) - b.std(correction=ddof)) ** 2).item() if d == 1 \
        else frechet_by_root(a, b, ddof)
    assert metrics.frechet_distance(a, b, ddof) == pytest.approx(expected, rel=1e-4)


def spectrum(n, d, name, lowest):
    "Features whose deviations fall from 1 to `lowest`, mixed by a rotation, as real ones are."
    turn = torch.linalg.qr(draw(d, d, name=f"turn {name}")).Q
    return draw(n, d, name=name) * torch.logspace(0, math.log10(lowest), d, dtype=torch.float64) @ turn


@pytest.mark.parametrize("n, m, d, lowest", [(300, 200, 24, 0.1), (500, 400, 128, 0.01), (60, 600, 48, 0.3), (700, 650, 256, 0.1)])
@pytest.mark.parametrize("ddof", [0, 1])
def test_frechet_agrees_with_float64_eigenvalues_and_with_the_root_to_what_is_asked(n, m, d, lowest, ddof):
    a, b = spectrum(n, d, "a", lowest) + 0.1, spectrum(m, d, "b", lowest) * 1.5
    x, y = a.numpy(), b.numpy()
    one, two = np.cov(x.T, ddof=ddof), np.cov(y.T, ddof=ddof)
    roots = np.sqrt(np.linalg.eigvals(one @ two).real.clip(min=0))
    by_eigenvalues = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(one) + np.trace(two) - 2 * roots.sum()
    found = metrics.frechet_distance(a, b, ddof)
    assert found == pytest.approx(by_eigenvalues, rel=1e-8)
    assert found == pytest.approx(frechet_by_root(a, b, ddof), rel=1e-4)


@pytest.mark.parametrize("n", [8, 20, 500])
def test_frechet_of_equal_sets_is_zero_and_a_shift_costs_its_square(n):
    a, shift = draw(n, 20), draw(20, name="shift")
    assert metrics.frechet_distance(a, a) <= 1e-8
    assert metrics.frechet_distance(a, a.flip(0)) <= 1e-8
    assert metrics.frechet_distance(a, a + shift) == pytest.approx(float(shift @ shift), abs=1e-6)


def test_frechet_with_dead_and_repeated_features():
    a, b = draw(300, 10, name="a"), draw(300, 10, name="b") + 0.5
    wide = lambda x: torch.cat([x, torch.zeros(300, 3), x[:, :2]], 1)
    assert metrics.frechet_distance(wide(a), wide(a)) <= 1e-8
    twice = torch.eye(10, dtype=torch.float64)
    twice[0, 0] = twice[1, 1] = 2**0.5
    assert metrics.frechet_distance(wide(a), wide(b)) == pytest.approx(metrics.frechet_distance(a @ twice, b @ twice), rel=1e-6)


def test_few_and_many_sample_forms_agree():
    a, b = draw(60, 64, name="a"), draw(60, 64, name="b") * 2
    pad = lambda x: torch.cat([x, x])
    few, many = metrics.frechet_distance(a, b, ddof=0), metrics.frechet_distance(pad(a), pad(b), ddof=0)
    assert few == pytest.approx(many, rel=1e-7)


def test_frechet_is_symmetric_and_blind_to_rotation():
    a, b = draw(200, 12, name="a"), draw(150, 12, name="b") * 1.5
    turn = torch.linalg.qr(draw(12, 12, name="turn")).Q
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a), rel=1e-10)
    assert metrics.frechet_distance(a @ turn, b @ turn) == pytest.approx(metrics.frechet_distance(a, b), rel=1e-10)


@pytest.mark.parametrize("bad", [torch.zeros(1, 4), torch.full((5, 4), math.nan), torch.zeros(5, 3)])
def test_frechet_refuses_what_it_cannot_measure(bad):
    with pytest.raises(ValueError, match="n, d"):
        metrics.frechet_distance(bad, torch.zeros(5, 4))


# KID, precision, recall, density, coverage

def test_kid_agrees_with_loops_and_is_unbiased():
    a, b = draw(9, 5, name="a"), draw(7, 5, name="b")
    k = lambda x, y: (float(x @ y) / 5 + 1) ** 3
    loop = sum(k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j) / (9 * 8) \
        + sum(k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j) / (7 * 6) \
        - 2 * sum(k(x, y) for x in a for y in b) / (9 * 7)
    assert metrics.kid(a, b) == pytest.approx(loop, rel=1e-10)
    assert metrics.kid(a, b, chunk=2) == pytest.approx(loop, rel=1e-10)
    values = np.array([metrics.kid(*draw(2, 12, 4, name=str(i))) for i in range(400)])
    assert abs(values.mean()) < 3.5 * values.std() / 20


def test_precision_recall_density_coverage_against_loops():
    real, fake, k = draw(30, 3, name="real"), draw(25, 3, name="fake") + 0.7, 3
    gap = lambda x, y: float((x - y).norm())
    radius = lambda xs: [sorted(gap(x, y) for y in xs)[k] for x in xs]
    of_real, of_fake = radius(real), radius(fake)
    inside = [[gap(r, f) < of_real[i] for i, r in enumerate(real)] for f in fake]
    expected = {"precision": np.mean([any(row) for row in inside]), "density": np.sum(inside) / k / len(fake),
                "coverage": np.mean(np.any(inside, 0)),
                "recall": np.mean([any(gap(r, f) < of_fake[j] for j, f in enumerate(fake)) for r in real])}
    assert metrics.precision_recall_density_coverage(real, fake, k) == pytest.approx(expected)
    with pytest.raises(ValueError, match="more than k"):
        metrics.precision_recall_density_coverage(real[:3], fake, k)


# Trunks and extractors

def test_a_trunk_is_found_verified_and_named(tmp_path):
    full = {"features.0.weight": draw(4, 3), "classifier.1.weight": draw(2, 2)}
    torch.save(full, tmp_path / "net.pth")
    digits = hashlib.sha256((tmp_path / "net.pth").read_bytes()).hexdigest()[:8]
    known, metrics.TRUNKS["alexnet"] = metrics.TRUNKS["alexnet"], (f"net-{digits}.pth",)
    try:
        (tmp_path / "net.pth").rename(tmp_path / f"net-{digits}.pth")
        state = metrics.load_trunk(tmp_path, "alexnet")
        assert list(state) == ["0.weight"] and torch.equal(state["0.weight"], full["features.0.weight"])
        file = tmp_path / f"net-{digits}.pth"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        with pytest.raises(DataRefused, match="damaged"):
            metrics.load_trunk(tmp_path, "alexnet")
    finally:
        metrics.TRUNKS["alexnet"] = known


def test_without_a_trunk_the_name_says_random_and_the_numbers_are_fixed():
    one, two = metrics.open_extractor(None), metrics.open_extractor(None, "random")
    x = images()
    assert one.name == two.name == "FD-random" and torch.equal(metrics.features(x, one), metrics.features(x, two))
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    metrics.open_extractor(None), metrics.open_lpips(None)
    assert torch.equal(torch.rand(1), first), "opening a network must not move the global generator"


@pytest.mark.parametrize("kind, words", [("inception", ("pt_inception-2015-12-05-6726825d.pth", "https://", "sha256 6726825d0af5")),
                                         ("alexnet", ("alexnet-owt-7be5be79.pth", "https://", "sha256 7be5be79"))])
def test_a_missing_trunk_names_file_url_and_hash(kind, words, tmp_path):
    with pytest.raises(DataMissing) as caught:
        metrics.open_extractor(tmp_path, kind)
    assert all(word in str(caught.value) for word in words) and len(str(caught.value).splitlines()) == 3


def test_inception_pools_as_the_2015_graph_does():
    net = metrics.build_inception(None)
    x = images(1, 99)
    assert net(F.interpolate(x, (299, 299))).shape == (1, 2048)
    plain, block = net.Mixed_7c.block, net.Mixed_7c
    y = torch.rand(2, 2048, 8, 8)
    assert block.largest and torch.equal(block(y)[:, -192:], plain.branch_pool(F.max_pool2d(y, 3, 1, 1)))
    y = torch.rand(2, 192, 9, 9)
    count = F.avg_pool2d(torch.ones(1, 1, 9, 9), 3, 1, 1)
    fair = net.Mixed_5b.block.branch_pool(F.avg_pool2d(y, 3, 1, 1) / count)
    assert torch.allclose(net.Mixed_5b(y)[:, -32:], fair, atol=1e-6)
    with pytest.raises(DataRefused, match="do not fit"):
        metrics.build_inception({"conv.weight": torch.zeros(1)})


def test_features_see_the_eight_bits_of_a_saved_image_and_small_images_are_enlarged():
    extractor, x = metrics.open_extractor(None), images(5, 32)
    levels = ((x + 1) * 127.5).round().to(torch.uint8)
    assert torch.allclose(metrics.features(x, extractor), metrics.features(levels, extractor), atol=1e-6)
    assert torch.allclose(metrics.features(x, extractor, 2), metrics.features(x, extractor), atol=1e-5)
    assert metrics.features(images(2, 512), extractor).shape == (2, 256)
    line = metrics.protocol(extractor, 10, 20, 32, ddof=0)
    assert all(word in line for word in ("FD-random", "10 real", "20 generated", "resized to 64", "ddof 0"))
    assert "resized" not in metrics.protocol(extractor, 10, 20, 64)


# C6: LPIPS

def lpips_by_loop(net, x, y, first=0):
    "LPIPS from its definition, tap by tap and position by position, in float64."
    net, total = net.double(), 0.0
    taps = [net.net(net.scaling_layer(v.double())) for v in (x, y)]
    for layer in range(first, 5):
        a, b = (t[layer][0] for t in taps)
        a, b = (v / (v.norm(dim=0, keepdim=True) + 1e-10) for v in (a, b))
        weight = net.lins[layer].model[-1].weight[0, :, 0, 0]
        total += float((weight[:, None, None] * (a - b) ** 2).sum(0).mean())
    return total


def test_lpips_is_its_definition_and_obeys_its_laws():
    lpips, x, y = metrics.open_lpips(None), images(3), images(3, name="others")
    assert lpips.name == "LPIPS-random"
    found, last = lpips(x, y), lpips(x, y, "last3")
    assert torch.equal(found, lpips(y, x)) and lpips(x, x).abs().max() == 0 and (last <= found).all()
    kept = lpips.features(x[:1])
    assert torch.allclose(lpips.distance(kept, lpips.features(y)), lpips(x[:1].expand(3, -1, -1, -1), y), atol=1e-7)
    for first, value in ((0, found), (2, last)):
        assert lpips_by_loop(lpips.net, x[:1], y[:1], first) == pytest.approx(float(value[0]), rel=1e-4)


@pytest.mark.parametrize("px, n", [(64, 3), (100, 2), (128, 2), (160, 1)])
def test_lpips_and_its_gradient_equal_the_public_package(px, n):
    lpips, x, y = metrics.open_lpips(WEIGHTS), images(n, px), images(n, px, name="others")
    near = (x + 0.02 * images(n, px, name="near")).clamp(-1, 1)

    def both(net, other):
        image = x.clone().requires_grad_()
        value = net(image, other).flatten()
        value.sum().backward()
        return value.detach(), image.grad
    for other in (y, near):
        (found, slope), (expected, their_slope) = both(lpips, other), both(lpips.net, other)
        assert float((found - expected).abs().max()) <= 1e-6 * min(1.0, float(expected.min())), "1e-6 of each value, none above 1 eased"
        assert float((slope - their_slope).norm()) <= 1e-5 * float(their_slope.norm())


@pytest.mark.parametrize("px", [16, 32, 64, 100])
def test_lpips_takes_small_images_and_passes_gradients(px):
    lpips, x, y = metrics.open_lpips(None), images(2, px).requires_grad_(), images(2, px, name="others")
    lpips(x, y).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    flat = torch.full((1, 3, px, px), -0.1, requires_grad=True)
    lpips(flat, flat.detach() - 0.5).sum().backward()
    assert flat.grad.isfinite().all(), "no NaN where features vanish"


def test_lpips_guards_its_range():
    lpips, x = metrics.open_lpips(None), images(2)
    for bad in (x * 1.2, x * 127.5, torch.full_like(x, math.nan)):
        with pytest.raises(ValueError, match="-1, 1"):
            lpips(bad, x)
    with pytest.warns(UserWarning, match="nothing is negative"):
        lpips((x + 1) / 2, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lpips(x, x)
        lpips(x.clamp(-1, 1) * 1.005, x)


@needs_trunk
def test_lpips_gives_its_authors_numbers():
    from PIL import Image
    lpips, folder = metrics.open_lpips(WEIGHTS), WEIGHTS / "lpips_reference"
    if not folder.is_dir():
        pytest.skip("DERMGAN_WEIGHTS has no lpips_reference")
    x, far, near = (torch.tensor(np.asarray(Image.open(folder / f"{name}.png").convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
                    for name in ("ex_ref", "ex_p0", "ex_p1"))
    assert lpips.name == "LPIPS"
    assert float(lpips(x, far)) == pytest.approx(0.722, abs=1e-3) and float(lpips(x, near)) == pytest.approx(0.138, abs=1e-3)
    taps = lpips.net(x, far, retPerLayer=True)[1]
    assert float(lpips(x, far, "last3")) == pytest.approx(float(sum(taps[2:])), abs=1e-6)


@needs_trunk
def test_real_trunks_are_named_and_deterministic():
    names = [metrics.open_extractor(WEIGHTS, kind).name for kind in ("alexnet", "squeezenet1_1")]
    assert names == ["FD-alex", "FD-squeeze"]
    extractor, x = metrics.open_extractor(WEIGHTS, "alexnet"), images()
    net = import_torchvision().models.alexnet(weights=None).features[:12].eval()
    net.load_state_dict({k.removeprefix("features."): v for k, v in metrics.load_weights(WEIGHTS / "alexnet_features.safetensors")[0].items()})
    mean, spread = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    levels = ((x + 1) * 127.5).round() / 255
    assert torch.allclose(metrics.features(x, extractor), net((levels - mean) / spread).mean((2, 3)), atol=1e-4)


def test_lpips_reads_the_trunk_of_a_safetensors_file(tmp_path):
    net = metrics.fill_random(metrics.open_extractor(None).net, "another")
    save_weights(tmp_path / "alexnet_features.safetensors", {f"features.{k}": v for k, v in net.state_dict().items()})
    lpips = metrics.open_lpips(tmp_path)
    assert lpips.name == "LPIPS" and torch.equal(lpips.net.net.state_dict()["slice5.10.weight"], net[10].weight)


# A generator's distance between its floor and its start

def test_gap_and_cuts_keep_lesions_together():
    assert metrics.gap_closed(5, 1, 9) == 0.5
    real = draw(80, 6, name="real")
    real = torch.cat([real, real])
    fake, bad = draw(200, 6, name="fake"), draw(200, 6, name="bad") + 4
    lesions = [str(i % 80) for i in range(160)]
    cuts = metrics.split_distances(real, fake, bad, lesions, seed=1, cuts=6)
    loose = metrics.split_distances(real, fake, bad, list(range(160)), seed=1, cuts=6)
    assert cuts["half against half"].mean() > 1.3 * loose["half against half"].mean(), "twins in both halves lower the floor"
    assert cuts["gap closed"].between(0.9, 1.1).all() and cuts.n.max() <= 80
    assert cuts.equals(metrics.split_distances(real, fake, bad, lesions, seed=1, cuts=6))


class Painter(nn.Module):
    "A generator that copies a stored image, or is grey before it has any."

    def __init__(self, px=32):
        super().__init__()
        self.shape, self.z_dim, self.store = {"px": px}, 4, None
        self.dummy = nn.Parameter(torch.zeros(1))

    def forward(self, z, noise="const"):
        if self.store is None:
            return torch.zeros(len(z), 3, *[self.shape["px"]] * 2)
        return self.store[(z[:, 0].abs() * 1e4).long() % len(self.store)]


def test_gan_distances_is_a_tidy_table(monkeypatch):
    from dermgan.phantom import sample
    held = sample(120, 32, seed=3)
    stored = SimpleNamespace(batch=lambda part: torch.from_numpy(held.images)[list(part)], lesion_ids=list(held.lesion_ids),
                             image_px=32, __len__=lambda self: 120)
    box = type("Box", (), {"__len__": lambda self: 120, **{k: staticmethod(v) if callable(v) else v for k, v in vars(stored).items()
                                                         if k != "__len__"}})()
    monkeypatch.setattr(metrics, "open_images", lambda run, split: box)
    monkeypatch.setattr(metrics, "evaluation_splits", lambda run: ("holdout",))
    g = Painter()
    g.store = torch.from_numpy(sample(200, 32, seed=4).images).float() / 127.5 - 1
    frame = metrics.gan_distances(g, SimpleNamespace(weights=None, seed=0, profile=SimpleNamespace(gan_fd_images=150)))
    value = frame.set_index("metric").value
    assert list(frame) == ["metric", "value", "low", "high", "n", "paper", "protocol"]
    assert value["gap closed"] > 0.8 and value["FD-random half against half"] < value["FD-random untrained"]
    assert frame.paper.isna().all() and not any("FID" in m for m in frame.metric), "a random trunk is never set beside the paper's FID"
    assert frame.protocol.str.contains("holdout").all() and frame.value.notna().all()


# Lesion attributes

@pytest.fixture(scope="module")
def phantom():
    from dermgan.phantom import sample
    return sample(500, 64, seed=77)


def dice(a, b):
    return 2 * (a & b).sum((1, 2)) / (a.sum((1, 2)) + b.sum((1, 2)))


def test_attributes_follow_the_phantoms_truth(phantom):
    seen = attributes.lesion_attributes(torch.from_numpy(phantom.images).float() / 127.5 - 1)
    at, size = (np.arange(64) + 0.5) / 64, phantom.masks.sum((1, 2))
    true = {"area": phantom.masks.mean((1, 2)), "x": (phantom.masks * at).sum((1, 2)) / size,
            "y": (phantom.masks * at[:, None]).sum((1, 2)) / size} | {k: phantom.factors[k] for k in ("skin_L", "skin_a", "skin_b")}
    ranks = {name: spearmanr(seen[name], value).statistic for name, value in true.items()}
    assert min(ranks.values()) >= 0.95, ranks
    assert np.median(np.abs(seen.x - true["x"])) < 0.02 and not seen.isna().any().any()


@pytest.mark.parametrize("px", [32, 64, 128])
def test_attributes_do_not_depend_on_the_resolution(px):
    from dermgan.phantom import sample
    few = {side: attributes.lesion_attributes(torch.from_numpy(sample(60, side, seed=9, artefacts={}).images).float() / 127.5 - 1)
           for side in (64, px)}
    for name in ("area", "x", "y", "skin_L"):
        assert spearmanr(few[64][name], few[px][name]).statistic > 0.9, name


def test_colour_agrees_with_the_standard():
    known = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])[:, :, None, None] * 2 - 1
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    assert np.abs(attributes.to_lab(known)[:, 0, 0] - np.array(expected)).max() < 0.1


def test_otsu_maximises_the_variance_between_the_sides():
    values = np.abs(draw(2, 20, 20, name="otsu").numpy()) * 3
    for level, image in zip(attributes.otsu(values), values):
        grid = np.arange(1, 128) / 128 * image.max()
        between = [((image < t).mean() * (image >= t).mean() * (image[image < t].mean() - image[image >= t].mean()) ** 2) for t in grid
                   if (image < t).any() and (image >= t).any()]
        side = image < level
        assert side.mean() * (~side).mean() * (image[side].mean() - image[~side].mean()) ** 2 >= 0.995 * max(between)


def test_flat_pictures_and_noise_do_not_crash():
    odd = torch.cat([torch.full((1, 3, 64, 64), v) for v in (-1.0, 0.0, 1.0)] + [images(1)])
    frame = attributes.lesion_attributes(odd)
    assert len(frame) == 4 and frame.area.between(0, 1).all()


@pytest.mark.skipif(not (DATA / "masks").is_dir(), reason="DERMGAN_DATA has no HAM10000 masks")
def test_real_lesions_are_found():
    from PIL import Image
    from dermgan.store import read_image, square, to_float
    names = sorted((DATA / "images").glob("*.jpg"))[::100]
    pixels = torch.from_numpy(np.stack([square(read_image(p), 64) for p in names])).permute(0, 3, 1, 2)
    masks = np.stack([np.asarray(Image.open(DATA / "masks" / f"{p.stem}_segmentation.png").convert("L").resize((64, 64), Image.BOX)) > 127
                      for p in names])
    overlap = dice(attributes.segment_lesions(attributes.to_lab(to_float(pixels))), masks)
    assert np.median(overlap) > 0.9 and overlap.mean() > 0.83
