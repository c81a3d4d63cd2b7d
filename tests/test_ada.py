"""The augmentation pipe: each transform against a plain restatement in float64, its rates, its derivatives, its controller."""
import math

import numpy as np
import pytest
import torch
from scipy import ndimage, signal, stats

from dermgan import ada, warp
from dermgan.ada import PIPES, Control, Pipe, augment_images, choose, control
from dermgan.core import rng

IDLE = dict.fromkeys(("scale", "stretch", "contrast", "saturation", "band0", "band1", "band2", "band3"), 1.0)


def values(n=1, **more):
    "What `choose` gives when nothing is applied, with some transforms set by hand."
    v = choose(Pipe(), 0.0, rng(0), n)
    return v | {k: torch.as_tensor(x, dtype=torch.float64).expand(n) for k, x in more.items()}


def noise_images(n=3, px=12, name="x"):
    return torch.randn(n, 3, px, px, generator=rng(0, name), dtype=torch.float64)


def test_p_zero_changes_no_bit_in_any_pipe_and_precision():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = noise_images().to(dtype)
        for name, pipe in PIPES.items():
            y = augment_images(x, 0.0, pipe, rng(1, name))
            assert y.dtype == dtype and torch.equal(y, x), name


def test_pipes_for_skin_leave_hue_and_light_alone_and_nvlabs_pipes_are_theirs():
    ours = {name: pipe for name, pipe in PIPES.items() if name.startswith("geometry")}
    assert len(ours) == 3 and all(pipe.hue == pipe.luma == pipe.bands == 0 for pipe in ours.values())
    parts = {"b": {"flip", "quarter", "shift"}, "g": {"scale", "turn", "stretch", "slide"},
             "c": {"brightness", "contrast", "luma", "hue", "saturation"}, "f": {"bands"}, "n": {"noise"}}
    extents = {"brightness_std", "contrast_std", "hue_max", "saturation_std"}
    for name in ("bg", "bgc", "bgcf", "bgcfn", "bgcfnc"):
        wanted = set().union(*(parts[c] for c in name[:5])) | ({"cutout"} if len(name) == 6 else set())
        assert {k for k, v in vars(PIPES[name]).items() if v and k not in extents} == wanted
        assert all(vars(PIPES[name])[k] == vars(Pipe())[k] for k in extents)


def blit_by_hand(x, flip, quarter, dx, dy):
    "One image [C, H, W]: mirrored, turned clockwise as y points down, then moved, with mirrored borders."
    x = x[:, :, ::-1] if flip else x
    x = np.rot90(x, -int(quarter), (1, 2))
    px = x.shape[1]
    wide = np.pad(x, ((0, 0), (px - 1, px - 1), (px - 1, px - 1)), "reflect")
    return wide[:, px - 1 - dy:2 * px - 1 - dy, px - 1 - dx:2 * px - 1 - dx]


def quarter_sign():
    "Which way a quarter turn goes is drawn uniformly, so either is right; the same for all images."
    y = warp.move_pixels(noise_images(1), ada.matrices(values(quarter=1), 12)[0])[0].numpy()
    x = noise_images(1)[0].numpy()
    return next(s for s in (1, -1) if np.array_equal(y, np.rot90(x, -s, (1, 2))))


@pytest.mark.parametrize("px", [8, 13])
def test_blit_is_exact(px):
    x, s = noise_images(60, px), quarter_sign()
    v = choose(PIPES["blit"], 1.0, rng(5), 60)
    y = augment_images(x, 1.0, PIPES["blit"], rng(5))
    for i in range(60):
        by_hand = blit_by_hand(x[i].numpy(), v["flip"][i], s * v["quarter"][i], int((v["shift_x"][i] * px).round()), int((v["shift_y"][i] * px).round()))
        assert np.array_equal(y[i].numpy(), by_hand), i
    assert len({tuple(map(int, t)) for t in torch.stack([v["flip"], v["quarter"]]).T.tolist()}) == 8


def test_shifts_by_whole_pixels_through_the_resampling_are_the_same_to_rounding():
    x = noise_images(16, 12)
    whole, _ = ada.matrices(choose(Pipe(shift=1), 1.0, rng(6), 16), 12)
    assert (whole[:, :2, 2] != 0).any(1).sum() > 10
    assert (warp.warp(x, whole) - warp.move_pixels(x, whole)).abs().max() < 1e-9


def moved_by_hand(v, i, px):
    "Where a feature at (x, y) from the centre of image i ends: the moves in the order of METHODS, forwards."
    def rotation(t):
        return np.array([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]])
    f = {k: float(x[i]) for k, x in v.items()}

    def forward(xy):
        xy = xy * [1 - 2 * f["flip"], 1]
        xy = rotation(-f["quarter"] * math.pi / 2) @ xy
        xy = xy + np.round([f["shift_x"] * px, f["shift_y"] * px])
        xy = rotation(-f["before"]) @ (xy * f["scale"])
        xy = rotation(-f["after"]) @ (xy * [f["stretch"], 1 / f["stretch"]])
        return xy + [f["slide_x"] * px, f["slide_y"] * px]
    return forward


def test_all_moves_follow_the_forward_formulas_on_a_smooth_blob():
    px, n = 64, 40
    at = np.arange(px) - (px - 1) / 2
    start = np.array([5.0, -8.0])
    blob = lambda centre: np.exp(-((at - centre[0])[None] ** 2 + (at - centre[1])[:, None] ** 2) / 18)
    v = choose(PIPES["bg"], 0.8, rng(7), n)
    x = torch.from_numpy(blob(start)).expand(n, 1, px, px)
    y = ada.place(x, v).numpy()[:, 0]
    checked = 0
    for i in range(n):
        goal = moved_by_hand(v, i, px)(start)
        if np.abs(goal).max() > 20:
            continue
        checked += 1
        near = (np.abs(at - goal[0]) < 9)[None] & (np.abs(at - goal[1]) < 9)[:, None]
        mass = np.where(near, y[i], 0)
        found = [(mass * at[None]).sum() / mass.sum(), (mass * at[:, None]).sum() / mass.sum()]
        assert np.abs(found - goal).max() < 0.25, (i, found, goal)
    assert checked > 20


@pytest.mark.parametrize("angle, scale, shift", [(0.0, 1.0, (0.4, -0.3)), (0.9, 1.0, (0.0, 0.0)), (2.5, 1.3, (1.7, 0.2)), (-1.2, 0.8, (0.0, 3.5))])
def test_a_warp_agrees_with_the_formula_of_a_smooth_image(angle, scale, shift):
    px = 48
    at = torch.arange(px).double() - (px - 1) / 2
    image = lambda x, y: torch.exp(-((x - 3) ** 2 / 40 + (y + 2) ** 2 / 70)) * torch.cos(x / 6)
    one = torch.ones(1, dtype=torch.float64)
    g = warp.turned_by(one * angle) @ warp.affine(one / scale, 0 * one, 0 * one, one / scale, -one * shift[0], -one * shift[1])
    xy = g[0] @ torch.stack([at.repeat(px), at.repeat_interleave(px), torch.ones(px * px).double()])
    seen = warp.warp(image(at[None], at[:, None])[None, None], g)[0, 0]
    off = (seen - image(xy[0], xy[1]).view(px, px))[8:-8, 8:-8].abs().max()
    a_quarter_pixel = (image(at[None] + 0.25, at[:, None]) - image(at[None], at[:, None])).abs().max()
    assert off < 0.5 * a_quarter_pixel


def test_doubling_and_halving_restate_scipy():
    x = noise_images(1, 10)[:, :1]
    taps = np.array(warp.SYM6) / np.sum(warp.SYM6)
    rows = np.apply_along_axis(lambda r: signal.upfirdn(2 * taps, r, up=2)[5:25], 1, x[0, 0].numpy())
    full = np.apply_along_axis(lambda r: signal.upfirdn(2 * taps, r, up=2)[5:25], 0, rows)
    assert np.abs(warp.double(x)[0, 0].numpy() - full).max() < 1e-12
    big = torch.randn(1, 1, 32, 32, generator=rng(1), dtype=torch.float64)
    down = lambda r: np.array([taps @ r[2 * i + 1:2 * i + 13] for i in range(10)])
    by_hand = np.apply_along_axis(down, 0, np.apply_along_axis(down, 1, big[0, 0].numpy()))
    assert np.abs(warp.halve(big)[0, 0].numpy() - by_hand).max() < 1e-12


def test_one_image_does_not_depend_on_its_neighbours_margins():
    x = noise_images(12, 16)
    v = choose(PIPES["bg"], 0.9, rng(11), 12)
    together = ada.place(x, v)
    margins = set()
    for i in range(12):
        one = {k: t[i:i + 1] for k, t in v.items()}
        whole, other = ada.matrices(one, 16)
        margins.add(warp.margin_for(whole @ other, 16))
        assert (ada.place(x[i:i + 1], one) - together[i]).abs().max() < 1e-12
    assert len(margins) > 3


def test_colours_follow_their_definitions_one_at_a_time_and_in_order():
    x = noise_images(1, 5)
    pixels = x[0].flatten(1).numpy()
    axis = np.ones(3) / math.sqrt(3)

    def by_hand(brightness=0.0, contrast=1.0, luma=0.0, hue=0.0, saturation=1.0):
        out = []
        for c in pixels.T:
            c = (c + brightness) * contrast
            along = (c @ axis) * axis
            c = c - 2 * luma * along
            along = (c @ axis) * axis
            c = along + (c - along) * math.cos(hue) + np.cross(axis, c) * math.sin(hue)
            along = (c @ axis) * axis
            out.append(along + (c - along) * saturation)
        return np.array(out).T

    for how in (dict(brightness=0.3), dict(contrast=1.7), dict(luma=1.0), dict(hue=0.8), dict(hue=-2.9), dict(saturation=0.3),
                dict(brightness=-0.2, contrast=0.6, luma=1.0, hue=1.1, saturation=2.5)):
        y = ada.recolour(x, values(**how))[0].flatten(1).numpy()
        assert np.abs(y - by_hand(**how)).max() < 1e-12, how


def test_the_filter_bank_restates_the_recursion_and_gains_act_in_the_frequency_domain():
    low = np.array([-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025])
    square = lambda h: np.convolve(h, h[::-1]) / 2
    below, above = square(low), square(low * [1, -1, 1, -1])
    bank = np.eye(4, 1)
    for i in range(1, 4):
        wide = np.zeros((4, 2 * bank.shape[1] - 1))
        wide[:, ::2] = bank
        bank = np.stack([np.convolve(row, below) for row in wide])
        middle = bank.shape[1] // 2
        bank[i, middle - 3:middle + 4] += above
    assert np.abs(ada.filter_bank().numpy() - bank).max() < 1e-9
    power = np.array([10, 1, 1, 1]) / 13
    chosen = {"band0": 0.5, "band1": 3.0, "band3": 2.0}
    gains = np.ones(4)
    for i in range(4):
        t = np.ones(4)
        t[i] = chosen.get(f"band{i}", 1.0)
        gains *= t / math.sqrt((power * t**2).sum())
    assert np.abs(ada.band_gains(values(**chosen))[0].numpy() - gains).max() < 1e-12
    px, k = 128, 9
    wave = torch.cos(2 * math.pi * k * torch.arange(px).double() / px)[None, None, None].expand(1, 3, px, px)
    y = ada.refilter(wave, values(**chosen))[0, 0].numpy()
    across = sum(g * np.sum(b * np.cos(2 * math.pi * k / px * (np.arange(43) - 21))) for g, b in zip(gains, bank))
    along = sum(g * b.sum() for g, b in zip(gains, bank))
    assert np.abs(y[:, 22:-22] - wave[0, 0, :, 22:-22].numpy() * across * along).max() < 1e-9


def test_filtering_small_images_mirrors_more_than_once():
    x = noise_images(2, 8)
    v = values(2, band3=2.0)
    taps = (ada.band_gains(v) @ ada.filter_bank())[0].numpy()
    by_hand = x.numpy()
    for axis in (2, 3):
        by_hand = ndimage.correlate1d(by_hand, taps, axis=axis, mode="mirror")
    assert np.abs(ada.refilter(x, v).numpy() - by_hand).max() < 1e-12


def test_noise_has_its_spread_and_cutout_its_box():
    grey = torch.zeros(64, 3, 32, 32)
    y = augment_images(grey, 1.0, PIPES["noise"], rng(3))
    sigma = choose(PIPES["noise"], 1.0, rng(3), 64)["noise"]
    ratio = y.double().std((1, 2, 3)) / sigma
    assert (ratio - 1).abs().max() < 5 / math.sqrt(2 * 3 * 32 * 32) and 0.05 < sigma.mean() < 0.11
    assert y.mean((1, 2, 3)).abs().div(sigma).max() < 5 / math.sqrt(3 * 32 * 32)
    cut = augment_images(torch.ones(64, 3, 32, 32), 1.0, PIPES["cutout"], rng(4))
    v = choose(PIPES["cutout"], 1.0, rng(4), 64)
    for image, cx, cy in zip(cut.numpy(), v["cut_x"].tolist(), v["cut_y"].tolist()):
        inside = lambda c: [abs((i + 0.5) / 32 - c) < 0.25 for i in range(32)]
        box = np.outer(inside(cy), inside(cx))
        assert np.array_equal(image, np.broadcast_to(1.0 - box, (3, 32, 32)))
    assert (cut == 0).float().mean((1, 2, 3)).max() == 0.25


RATES = [("flip", 0.5), ("quarter", 0.75), ("shift_x", 1.0), ("scale", 1.0), ("stretch", 1.0), ("slide_y", 1.0), ("brightness", 1.0),
         ("contrast", 1.0), ("luma", 0.5), ("hue", 1.0), ("saturation", 1.0), ("band2", 1.0), ("noise", 1.0), ("cutout", 1.0)]


@pytest.mark.parametrize("p", [0.1, 0.45, 1.0])
def test_transforms_are_applied_as_often_as_p_says(p):
    n = 4000
    v = choose(PIPES["bgcfnc"], p, rng(8), n)
    seen = {name: int((v[name] != IDLE.get(name, 0.0)).sum()) for name, _ in RATES}
    turned = int(((v["before"] != 0) | (v["after"] != 0)).sum())
    for name, count, rate in [(name, seen[name], rate * p) for name, rate in RATES] + [("turn", turned, p)]:
        low, high = stats.binom.interval(1 - 1e-5, n, rate)
        assert low <= count <= high, (name, count, rate)
    half = choose(Pipe(**{k: 0.5 for k in ("flip", "scale", "noise")}), p, rng(9), n)
    assert stats.binomtest(int((half["scale"] != 1).sum()), n, p / 2).pvalue > 1e-5 and (half["hue"] == 0).all()


def test_drawn_values_have_their_distributions():
    v = {k: x.numpy() for k, x in choose(PIPES["bgcfnc"], 1.0, rng(10), 4000).items()}
    normal = {"scale": np.log2(v["scale"]) / 0.2, "stretch": np.log2(v["stretch"]) / 0.2, "slide": v["slide_x"] * 8, "brightness": v["brightness"] / 0.2,
              "contrast": np.log2(v["contrast"]) / 0.5, "saturation": np.log2(v["saturation"]), "band": np.log2(v["band1"])}
    for name, z in normal.items():
        assert stats.kstest(z, "norm").pvalue > 1e-4, name
    assert stats.kstest(v["noise"] * 10, "halfnorm").pvalue > 1e-4
    for z in (v["before"] / math.pi, v["after"] / math.pi, v["hue"] / math.pi, v["shift_y"] * 8):
        assert stats.kstest((z + 1) / 2, "uniform").pvalue > 1e-4
    assert stats.chisquare(np.bincount(v["quarter"].astype(int))).pvalue > 1e-4


def test_derivatives_of_first_and_second_order():
    x = torch.randn(2, 3, 4, 4, generator=rng(2), dtype=torch.float64, requires_grad=True)
    v = choose(PIPES["bgcfnc"], 0.9, rng(13), 2)
    assert not torch.equal(v["before"], v["flip"]) and (v["hue"] != 0).any() and (v["band1"] != 1).any()
    assert torch.autograd.gradcheck(lambda t: augment_images(t, 0.9, PIPES["bgcfnc"], rng(13)), x, fast_mode=True)
    for part in (ada.place, ada.recolour, ada.refilter):
        assert torch.autograd.gradgradcheck(lambda t: part(t, v).pow(3), x, fast_mode=True), part.__name__


def test_the_sampler_and_its_transpose_to_second_order():
    x = torch.randn(1, 1, 3, 4, generator=rng(3), dtype=torch.float64, requires_grad=True)
    grid = (torch.rand(1, 2, 5, 2, generator=rng(4)) * 2.4 - 1.2).double()
    sampled = lambda t: warp.Sampled.apply(t, grid)
    assert torch.equal(sampled(x), torch.nn.functional.grid_sample(x, grid, align_corners=False))
    assert torch.autograd.gradcheck(sampled, x) and torch.autograd.gradgradcheck(lambda t: sampled(t).pow(3), x)
    matrix = torch.autograd.functional.jacobian(sampled, x.detach()).reshape(10, 12)
    y = torch.randn(1, 1, 2, 5, generator=rng(5), dtype=torch.float64, requires_grad=True)
    assert torch.allclose(warp.Spread.apply(y, grid, x.shape).flatten(), matrix.T @ y.flatten(), atol=1e-14)
    assert torch.autograd.gradgradcheck(lambda t: warp.Spread.apply(t, grid, x.shape).pow(3), y)


def test_r1_through_the_pipe_reaches_the_critics_weights():
    from dermgan.losses import r1_penalty
    x, size = noise_images(2, 4), 48
    weight = torch.randn(3, 4, 4, generator=rng(14), dtype=torch.float64, requires_grad=True)
    pipe = lambda images: augment_images(images, 0.9, PIPES["bgcfnc"], rng(15))
    critic = lambda images: (pipe(images) * weight).sum((1, 2, 3)).square()
    columns = torch.eye(size, dtype=torch.float64).view(size, 3, 4, 4)
    zero, w, total = pipe(torch.zeros_like(x)), weight.flatten(), 0
    steps = [pipe(column.expand_as(x)) - zero for column in columns]
    for i in range(2):
        jacobian = torch.stack([step[i].flatten() for step in steps], 1)
        seen = zero[i].flatten() + jacobian @ x[i].flatten()
        total = total + (2 * (seen @ w) * (jacobian.T @ w)).square().sum()
    ours, theirs = r1_penalty(critic, x, 1.0), total / 2 * 0.5
    assert torch.allclose(ours, theirs, rtol=1e-9) and not torch.equal(pipe(x), x)
    slopes = [torch.autograd.grad(value, weight)[0] for value in (ours, theirs)]
    assert torch.allclose(*slopes, rtol=1e-8, atol=1e-9 * slopes[0].abs().max())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_batch_is_its_groups_one_after_another(groups):
    x = noise_images(8, 16)
    seeds = range(groups)
    whole = augment_images(x, 0.7, PIPES["bgcfnc"], [rng(20, k) for k in seeds])
    parts = [augment_images(part, 0.7, PIPES["bgcfnc"], rng(20, k)) for k, part in zip(seeds, x.chunk(groups))]
    assert (whole - torch.cat(parts)).abs().max() < 1e-12 and (whole - x).abs().max() > 0.1
    with pytest.raises(ValueError, match="do not divide"):
        augment_images(x[:7], 0.7, PIPES["bg"], [rng(0), rng(1)])


def test_half_precision_is_computed_in_full():
    x = noise_images(4, 16).bfloat16()
    y = augment_images(x, 0.9, PIPES["bgcfnc"], rng(21))
    full = augment_images(x.double(), 0.9, PIPES["bgcfnc"], rng(21))
    assert y.dtype == torch.bfloat16 and ((y.double() - full).abs() <= full.abs() * 2**-8 + 1e-5).all()


def test_the_controller_moves_waits_and_clamps():
    state = Control()
    for sign in (1.0, 1.0, 1.0):
        control(state, torch.tensor(sign), 0.6, batch=64, kimg=500)
    assert state.p == 0.0 and len(state.signs) == 3
    control(state, torch.tensor(-0.5), 0.6, batch=64, kimg=500)
    assert state.p == pytest.approx(64 * 4 / 500_000) and state.signs == []
    for _ in range(4):
        control(state, torch.tensor(0.5), 0.6, batch=64, kimg=500)
    assert state.p == 0.0
    for _ in range(4):
        control(state, torch.tensor(0.5), 0.6, batch=64, kimg=500)
    assert state.p == 0.0
    for _ in range(40):
        control(state, torch.tensor(0.9), 0.6, batch=64, kimg=1)
    assert state.p == 1.0


def test_overfitting_is_the_share_of_the_way_and_sees_what_was_held_out():
    weight = torch.randn(48, generator=rng(30), dtype=torch.float64)
    train, val, fake = (torch.randn(40, 3, 4, 4, generator=rng(31, k), dtype=torch.float64) for k in "tvf")
    critic = lambda x: x.flatten(1) @ weight
    d = [float(np.mean(x.flatten(1).numpy() @ weight.numpy())) for x in (train, val, fake)]
    assert ada.overfitting(critic, train, val, fake, batch=7) == pytest.approx((d[0] - d[1]) / (d[0] - d[2]))
    by_heart = lambda x: (x.flatten(1)[:, None] == train.flatten(1)).all(2).any(1).double()
    assert ada.overfitting(by_heart, train, val, fake) == 1.0 and ada.overfitting(by_heart, train, train, fake) == 0.0
