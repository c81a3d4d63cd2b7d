"""The explorer's parts against independent oracles, and with real faults: broken uploads, a full disk, damaged reviews (R19, R20)."""
import asyncio
import errno
import hashlib
import heapq
import io
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import cohen_kappa_score
from traitlets.utils.bunch import Bunch

from dermgan import directions, frames, review
from dermgan.core import DataMissing, DataRefused, DiskFull, RunMismatch, resolve_run
from dermgan.directions import (EFFECTS, Candidate, best_of, duplicates, effect_vector, equal_step, fit_reader, gather, jacobian,
                                measure_group, mixes, planted, selectivity, suggest, thirteen)
from dermgan.encode import decoder_key
from dermgan.factorize import Transformation, draw_codes, lpips_of_step, move, render, same_direction
from dermgan.frames import (Latest, Move, augment_folder, encode_picture, export_picture, picture, random_source, reproduce_picture,
                            upload_source)
from dermgan.gan import open_generator
from dermgan.hyperstyle import Inversion, Nets
from dermgan.labels import label_flips, wilson
from dermgan.metrics import open_lpips
from dermgan.phantom import pack_phantom, sample
from dermgan.reproduce import main
from dermgan.review import Review, Row, alike, chosen, decide, kappa, load_review, match_review, merge_reviews, save_review, verdict
from dermgan.stylegan2 import Generator, save_generator

TOP = Path(__file__).resolve().parent.parent
NAMES = [name for group in EFFECTS.values() for name in group]


def generator(seed=0, image_px=32):
    torch.manual_seed(seed)
    g = Generator(image_px, z_dim=16, w_dim=24, channel_base=256, channel_max=16, mapping_layers=2)
    return g.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A real run: phantom packed, a generator kept, three candidates measured; images inverted by a projector of three steps."
    held = {name: os.environ.pop(name) for name in ("DERMGAN_DATA", "DERMGAN_WEIGHTS") if name in os.environ}
    changes = {"invert_method": "projector", "invert_steps": "3", "invert_sources": "8", "phantom_lesions": "60", "factor_images": "8"}
    made = resolve_run("smoke", 0, changes, root=tmp_path_factory.mktemp("runs"))
    os.environ.update(held)
    pack_phantom(made)
    torch.manual_seed(1)
    g = Generator(32, 64, 64, 512, 32, 2).eval().requires_grad_(False)
    save_generator(made.path("ckpt", "generator.safetensors"), g, {})
    found, _ = measure_group(g, "sefa", gather(g, "sefa", 3)["all"], draw_codes(g, 6, 0), None)
    rows = [c._asdict() | {"t": c.t._asdict() | {"direction": c.t.direction.tolist()}} for c in found]
    made.path("ckpt", "candidates.json").write_text(json.dumps({"made_by": {}, "candidates": rows}))
    review.save_transformations(made.path("ckpt", "suggested.json"), dict.fromkeys(review.NAMES) | {"SV": found[0].t._replace(name="SV")})
    return made


# ---- what directions do -------------------------------------------------------------------------------------------------------

def test_the_jacobian_is_autograds():
    g = generator(image_px=8).double()
    found = jacobian(g, [0, 1], step=1e-4)
    base = g.w_avg.expand(1, g.num_ws, -1)
    mask = torch.zeros(g.num_ws, 1, dtype=torch.float64)
    mask[:2] = 1
    shift = lambda d: g.synthesis(base + mask * d, "const").flatten()
    J = torch.autograd.functional.jacobian(shift, torch.zeros(24, dtype=torch.float64))
    values = np.linalg.svd(J.numpy(), compute_uv=False) ** 2
    assert np.abs(found.values.numpy() - values).max() < 1e-4 * values[0]
    v = found.vectors[0]
    assert torch.allclose(J.T @ (J @ v), found.values[0] * v, atol=1e-3 * float(found.values[0]))


def test_a_mix_is_the_ridge_solution():
    draw = np.random.default_rng(0)
    alphas, E = [0.5, 1.0, 2.0, 4.0], draw.normal(size=(4, len(NAMES)))
    axes = torch.eye(24, dtype=torch.float64)
    moves = [Transformation("", axes[i], [0], a, i) for i, a in enumerate(alphas)]
    rows = [{"direction": i, "attribute": n, "value": E[i, k] * alphas[i]} for i in range(4) for k, n in enumerate(NAMES)]
    found = mixes(pd.DataFrame(rows), moves, shrink=0.05)[2]
    lam = 0.05 * np.trace(E @ E.T) / 4
    wish = np.array([name == "area" for name in NAMES], float)
    whole, target = np.vstack([E.T, np.sqrt(lam) * np.eye(4)]), np.concatenate([wish, np.zeros(4)])
    c = np.linalg.lstsq(whole, target, rcond=None)[0]
    assert np.abs(found.direction[:4].numpy() - c / np.linalg.norm(c)).max() < 1e-10


def test_a_step_reaches_its_lpips():
    g, lpips = generator(), open_lpips(None)
    ws = draw_codes(g, 5, 0)
    kept = lpips.features(render(g, ws))
    for t in gather(g, "raw", 2)["early"]:
        target = lpips_of_step(g, ws, t, 0.5 * t.alpha, lpips, kept)
        step = equal_step(g, ws, t._replace(alpha=3 * t.alpha), lpips, kept, target, t.alpha, rounds=5)
        assert abs(step / (0.5 * t.alpha) - 1) < 0.1
        assert equal_step(g, ws, t, lpips, kept, 1e9, t.alpha) == pytest.approx(4 * t.alpha)


def crowd(seed, n=40):
    draw, vectors = np.random.default_rng(seed), torch.nn.functional.normalize(torch.randn(12, 6, dtype=torch.float64), dim=1)
    kinds = draw.normal(size=(6, len(NAMES)))
    return [Candidate(f"sefa {i} @ 0-1", Transformation("", vectors[draw.integers(12)], [int(draw.integers(3))], 1.0, i),
                      dict(zip(NAMES, kinds[draw.integers(6)] * draw.choice([-1, 1]) + 0.1 * draw.normal(size=len(NAMES)))),
                      str(draw.choice(["", "SV", "PS"])), "", float(draw.random())) for i in range(n)]


@pytest.mark.parametrize("seed", range(4))
def test_a_group_has_one_leader_that_its_members_resemble(seed):
    found = crowd(seed)
    lead = duplicates(found)
    def near(a, b):
        x, y = effect_vector(a), effect_vector(b)
        return same_direction(a.t, b.t) or abs(x @ y) / np.linalg.norm(x) / np.linalg.norm(y) > 0.95
    leaders = sorted(set(lead))
    assert all(lead[i] == i for i in leaders) and all(near(found[i], found[lead[i]]) for i in range(len(found)))
    assert not any(near(found[a], found[b]) for a, b in itertools.combinations(leaders, 2))
    shown = thirteen(found, "sefa")
    assert len(shown) == len(set(shown)) == min(13, len(shown)) and len({lead[i] for i in shown}) >= len(shown) - 2


def test_the_own_method_comes_before_a_stronger_other():
    make = lambda key, merit: Candidate(key, None, {}, "SV", "", merit)
    found = [make("mix 1 @ 0-1", 0.9), make("sefa 2 @ 0-1", 0.4), make("sefa 5 @ 0-1", 0.5)]
    assert best_of(found, "sefa")["SV"].key == "sefa 5 @ 0-1" and best_of(found, "raw")["SV"].key == "mix 1 @ 0-1"
    assert best_of(found, "sefa")["PS"] is None


def test_a_reason_names_what_moves_and_how_much():
    rows = pd.DataFrame([{"attribute": n, "value": v, "low": v - 0.05, "high": v + 0.05} for n, v in
                         (dict.fromkeys(NAMES, 0.0) | {"x": 0.8, "skin_a": -0.2}).items()])
    name, why, merit = suggest(rows, [3, 4])
    assert name == "PS" and "position 0.80" in why and "skin 0.20 (25%)" in why and "3-4" in why
    assert merit == pytest.approx(0.8**2 / np.hypot(0.8, 0.2))
    assert selectivity({"x": 0.8, "skin_a": -0.2}) == pytest.approx(0.8 / np.hypot(0.8, 0.2))
    unsure = rows.assign(low=rows.value - 2, high=rows.value + 2)
    assert suggest(unsure, [3, 4])[0] == ""


def test_the_reader_reads_factors_and_not_noise():
    drawn = sample(400, 32, seed=3)
    truth = planted(drawn.factors)
    images = torch.from_numpy(drawn.images)
    read, r2 = fit_reader(images, truth)
    assert r2[["x", "y", "tone", "size"]].min() > 0.4
    shuffled = truth.sample(frac=1, random_state=0).reset_index(drop=True)
    assert fit_reader(images, shuffled)[1].max() < 0.15
    right = sample(60, 32, seed=4, fixed={"x": 0.62}), sample(60, 32, seed=4, fixed={"x": 0.38})
    a, b = (read(torch.from_numpy(s.images).float() / 127.5 - 1).x for s in right)
    assert (a > b).mean() > 0.95


# ---- the review ---------------------------------------------------------------------------------------------------------------

def row(key="sefa 3 @ 0-2", effects=None, reviews=(), w_dim=24, seed=0):
    vector = torch.nn.functional.normalize(torch.randn(w_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=0)
    return Row(key, [0, 1, 2], 2.5, [-7.5, 7.5], vector, effects or {"area": 0.6, "x": 0.1}, "SV", list(reviews))


def word(who="AB", decision="keep", category="SV", time="2026-01-01T00:00:00+00:00", name="larger"):
    return {"decision": decision, "name": name, "category": category, "note": "größer: \"no\" # yaml\n- x", "reviewer": who, "time": time}


def test_a_review_comes_back_as_it_was(tmp_path):
    path = tmp_path / "directions.yaml"
    before = Review("g1", {"sefa 3 @ 0-2": row(reviews=[word(), word("CD", "reject")])})
    save_review(path, before)
    after = load_review(path)
    assert after.generator == "g1" and after.rows["sefa 3 @ 0-2"].reviews == before.rows["sefa 3 @ 0-2"].reviews
    assert float(after.rows["sefa 3 @ 0-2"].vector @ before.rows["sefa 3 @ 0-2"].vector) > 1 - 1e-6
    assert "no dermatologist" in path.read_text() and yaml.safe_load(path.read_text())["directions"][0]["layers"] == [0, 1, 2]
    assert load_review(tmp_path / "none.yaml") == Review("", {})


DAMAGE = {"cut": lambda b: b[:-60], "empty": lambda b: b"", "binary": lambda b: b"\xff\xfe\x00" + b, "list": lambda b: b"- 1\n- 2\n",
          "decision": lambda b: b.replace(b"decision: keep", b"decision: perhaps"), "layers": lambda b: b.replace(b"alpha: 2.5", b"alpha: much"),
          "code": lambda b: b.replace(b"generator: g1", b"generator: !!python/object/apply:os.system ['touch hit']"),
          "vector": lambda b: b.replace(b"vector: ", b"vector: ?")}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_review_is_said_and_left_alone(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save_review(tmp_path / "directions.yaml", Review("g1", {"sefa 3 @ 0-2": row(reviews=[word()])}))
    path.write_bytes(bad := DAMAGE[kind](path.read_bytes()))
    with pytest.raises(DataRefused) as caught:
        decide(path, "g1", row(), word())
    assert len(str(caught.value).splitlines()) == 3 and path.read_bytes() == bad
    assert not (tmp_path / "hit").exists() and {p.name for p in tmp_path.iterdir()} == {"directions.yaml"}


def test_a_full_disk_and_a_read_only_file_lose_nothing(tmp_path, monkeypatch):
    path = save_review(tmp_path / "directions.yaml", Review("g1", {"sefa 3 @ 0-2": row(reviews=[word()])}))
    before = path.read_bytes()
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskFull, match="full"):
            decide(path, "g1", row(), word(decision="reject"))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    path.chmod(0o444)
    with pytest.raises(DataRefused, match="read-only"):
        decide(path, "g1", row(), word(decision="reject"))
    assert path.read_bytes() == before
    path.chmod(0o644)
    assert [w["decision"] for w in decide(path, "g1", row(), word(decision="reject")).rows["sefa 3 @ 0-2"].reviews] == ["keep", "reject"]
    with pytest.raises(RunMismatch, match="another generator"):
        decide(path, "g2", row(), word())
    with pytest.raises(DataRefused, match="initials"):
        decide(path, "g1", row(), word(who=" "))


@pytest.mark.parametrize("seed", range(3))
def test_kappa_is_scikit_learns(seed):
    draw = random.Random(seed)
    a = [draw.choice(review.DECISIONS) for _ in range(30)]
    b = [x if draw.random() < 0.6 else draw.choice(review.DECISIONS) for x in a]
    found = kappa(a, b)
    assert found["value"] == pytest.approx(cohen_kappa_score(a, b)) and found["low"] < found["value"] < found["high"]
    assert np.isnan(kappa(["keep"] * 4, ["keep"] * 4)["value"]) and np.isnan(kappa([], [])["value"])


def test_two_files_merge_either_way_and_twice():
    a = Review("g1", {k: row(k, reviews=[word("AB", d, time=f"t{k}")]) for k, d in (("1 1 @ 0", "keep"), ("1 2 @ 0", "reject"))})
    b = Review("g1", {k: row(k, reviews=[word("CD", d, time=f"u{k}")]) for k, d in (("1 2 @ 0", "keep"), ("1 3 @ 0", "keep"))})
    (one, agreement), (two, _) = merge_reviews(a, b), merge_reviews(b, a)
    assert {k: r.reviews for k, r in one.rows.items()} == {k: r.reviews for k, r in two.rows.items()} and len(one.rows) == 3
    assert [verdict(one.rows[k]) for k in ("1 1 @ 0", "1 2 @ 0", "1 3 @ 0")] == ["keep", "unsure", "keep"]
    assert agreement.n.tolist() == [1] and merge_reviews(one, a)[0].rows["1 2 @ 0"].reviews == one.rows["1 2 @ 0"].reviews
    with pytest.raises(RunMismatch):
        merge_reviews(a, b._replace(generator="g2"))


@pytest.mark.parametrize("seed", range(3))
def test_matching_is_the_best_of_all_pairings(seed):
    draw = np.random.default_rng(seed)
    effects = lambda: dict(zip(NAMES[:5], draw.normal(size=5)))
    old = [row(f"sefa {i} @ 0-2", effects(), [word(name=f"n{i}")]) for i in range(4)]
    axis = torch.eye(24, dtype=torch.float64)
    new = [Candidate(f"sefa {i} @ 0-1", Transformation("", axis[i], [0, 1], 1.0, i), effects(), "", "", 0.0) for i in range(4)]
    cosine = np.abs(alike([r.effects for r in old], [c.effects for c in new]))
    by_hand = lambda e, f: abs(sum(e[k] * f[k] for k in e)) / np.sqrt(sum(x * x for x in e.values()) * sum(x * x for x in f.values()))
    assert cosine[1, 2] == pytest.approx(by_hand(old[1].effects, new[2].effects))
    best = max(itertools.permutations(range(4)), key=lambda p: sum(cosine[i, j] for i, j in enumerate(p)))
    rows = match_review(Review("g1", {r.key: r for r in old}), new, "g2", least=0.0)
    assert {r.key: r.reviews[0]["name"] for r, state, _ in rows if state == "matched"} == {f"sefa {j} @ 0-1": f"n{i}" for i, j in enumerate(best)}
    nothing = match_review(Review("g1", {r.key: r for r in old}), new, "g2", least=1.01)
    assert {state for _, state, _ in nothing} == {"suggested"}


def test_a_match_that_runs_backwards_is_turned_round():
    axis = torch.eye(24, dtype=torch.float64)
    old = row(effects={"area": 1.0, "x": 0.0}, reviews=[word()])
    new = Candidate("raw 0 @ 0-1", Transformation("", axis[0], [0, 1], 2.0, 0), {"area": -0.5, "x": 0.01}, "SV", "", 0.5)
    found, state, likeness = match_review(Review("g1", {old.key: old}), [new], "g2")[0]
    assert state == "matched" and likeness > 0.99 and torch.equal(found.vector, -axis[0]) and found.effects["area"] == 0.5
    picked = chosen([(found, state, likeness)], {})
    assert picked["SV"][1] == "matched" and picked["SV"][0].number == 0 and picked["PS"] == (None, "none")


# ---- pictures -----------------------------------------------------------------------------------------------------------------

def moves():
    axis = torch.nn.functional.normalize(torch.randn(2, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64), dim=1)
    return [Move("sefa 0 @ 0-3", axis[0], [0, 1, 2, 3], 3.3), Move("raw 1 @ 5", axis[1], [5], -1.7)]


def test_a_recipe_gives_the_same_bytes_in_another_process(tmp_path):
    nets = Nets(generator())
    png, recipe = export_picture(nets, random_source(nets, 4), moves())
    save_generator(tmp_path / "g.safetensors", nets.g, {})
    (tmp_path / "recipe.json").write_text(recipe)
    code = ("import sys, torch; torch.set_num_threads(2)\nfrom pathlib import Path\nfrom dermgan.stylegan2 import load_generator\n"
            "from dermgan.hyperstyle import Nets\nfrom dermgan.frames import reproduce_picture\n"
            "g = load_generator(Path('g.safetensors'))\ng = g[0] if isinstance(g, tuple) else g\n"
            "Path('again.png').write_bytes(reproduce_picture(Nets(g.eval()), Path('recipe.json').read_text()))")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(TOP)})
    assert (tmp_path / "again.png").read_bytes() == png
    ws = draw_codes(nets.g, 1, 4, 0.7)
    for m in moves():
        ws = ws.clone()
        ws[:, m.layers] += m.alpha * m.vector.float()
    image = np.asarray(Image.open(io.BytesIO(png)))
    assert np.abs(image.astype(int) - ((render(nets.g, ws)[0].permute(1, 2, 0) + 1) * 127.5).numpy()).max() <= 0.51


def test_a_recipe_of_another_generator_or_another_picture_is_refused():
    nets = Nets(generator())
    _, recipe = export_picture(nets, random_source(nets, 4), moves())
    with pytest.raises(RunMismatch):
        reproduce_picture(Nets(generator(1)), recipe)
    with pytest.raises(DataRefused, match="another picture"):
        reproduce_picture(nets, recipe.replace('"alpha": 3.3', '"alpha": 9.3'))
    for bad in ("", "[]", recipe[:-9], recipe.replace("<f4", "|O")):
        with pytest.raises(DataRefused, match="cannot be read"):
            reproduce_picture(nets, bad)


class Clock:
    "A loop that never waits: events in order of their time; work may take time."

    def __init__(self):
        self.now, self.queue, self.count = 0.0, [], 0

    def later(self, wait, call):
        heapq.heappush(self.queue, (self.now + wait, self.count, call))
        self.count += 1

    def run(self):
        while self.queue:
            when, _, call = heapq.heappop(self.queue)
            self.now = max(self.now, when)
            call()


@pytest.mark.parametrize("work_s", [0.0, 0.03, 0.12, 0.4])
@pytest.mark.parametrize("events", [50, 500])
def test_fifty_events_in_half_a_second_make_five_drawings(monkeypatch, work_s, events):
    clock, drawn = Clock(), []
    monkeypatch.setattr(frames.time, "monotonic", lambda: clock.now)
    def work(value):
        clock.now += work_s
        drawn.append((value, clock.now))
    latest = Latest(work, later=clock.later)
    for k in range(events):
        clock.later(0.5 * k / events, lambda k=k: latest(k))
    clock.run()
    assert 1 <= len(drawn) <= 5 and drawn[-1][0] == events - 1
    assert drawn[0][1] <= 0.021 + work_s, "a single move does not wait"


def test_a_failing_drawing_does_not_stop_the_next(monkeypatch):
    clock, seen = Clock(), []
    def work(value):
        seen.append(value)
        if value == 1:
            raise ValueError
    latest = Latest(work, later=clock.later)
    latest(1)
    with pytest.raises(ValueError):
        clock.run()
    latest(2)
    clock.run()
    assert seen == [1, 2]


# ---- the explorer -------------------------------------------------------------------------------------------------------------

def file(image, kind="PNG", **options):
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def uploads():
    "R11's files and two large ones: name -> bytes, and whether they are shown."
    draw = np.random.default_rng(0)
    rgb = Image.fromarray(draw.integers(0, 255, (80, 100, 3), np.uint8))
    jpeg = file(rgb, "JPEG")
    flipped = bytearray(file(rgb))
    flipped[len(flipped) // 2] ^= 255
    turned = Image.Exif()
    turned[0x0112] = 6
    noise = Image.fromarray(draw.integers(0, 255, (1900, 1900, 3), np.uint8))
    return {"empty.png": (b"", False), "text.png": (b"hello", False), "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", False),
            "half.jpg": (jpeg[:len(jpeg) // 2], False), "flipped.png": (bytes(flipped), False), "gif.jpg": (file(rgb, "GIF"), False),
            "16000.png": (file(Image.new("1", (16000, 16000))), False), "10000x9600.png": (file(Image.new("1", (10000, 9600))), False),
            "one.png": (file(Image.new("RGB", (1, 1))), False), "sixteen.png": (file(Image.fromarray(draw.integers(0, 65535, (40, 40), np.uint16))), True),
            "cmyk.jpg": (file(rgb.convert("CMYK"), "JPEG"), True), "rgba.png": (file(rgb.convert("RGBA")), True),
            "turned.jpg": (file(rgb, "JPEG", exif=turned), True), "moving.webp": (file(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)]), True),
            "9.9 MB.png": (file(noise)[:-12] + bytes(0), False), "12 MB.png": (bytes(12 * 2**20), False),
            "../../etc/C:\\private\\path.png": (file(rgb), True), "no lesion.png": (file(Image.new("RGB", (64, 64), (230, 190, 170))), True),
            "<b>name</b>.png": (file(rgb), True)}


def contents(folder):
    return {p: p.stat().st_mtime_ns for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture
def page(run, tmp_path, monkeypatch):
    from dermgan.explore import Explorer
    shown = Explorer(run, path=tmp_path / "review" / "directions.yaml")
    shown.draw()
    return shown


def test_uploads_are_shown_or_refused_in_a_sentence(page, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(run.folder), contents(tmp_path)
    for name, (data, good) in uploads().items():
        picture_before, source_before = page.out["pictures"].value, page.shown
        page.c["upload"].set_trait("value", (Bunch(name=name, type="", size=len(data), content=memoryview(data),
                                                  last_modified=pd.Timestamp.now().to_pydatetime()),))
        page.draw()
        said = page.out["status"].value
        text = said.split(">", 1)[1].rsplit("<", 1)[0]
        assert "Traceback" not in said and "\n" not in text and len(text) < 420, (name, said)
        if good:
            assert page.shown is not source_before and page.shown.original.shape == (3, 32, 32), (name, said)
            assert page.shown.words["kind"] == "upload" and "/" not in page.shown.words["name"] and "\\" not in page.shown.words["name"]
            assert "<b>" not in page.out["pictures"].value
        else:
            assert page.shown is source_before and page.out["pictures"].value == picture_before and "not used" in text, (name, said)
        assert page.c["upload"].value == ()
    assert (contents(run.folder), contents(tmp_path)) == before


def test_slider_events_in_a_real_loop_draw_the_last_value_and_keep_memory(page):
    async def shake(count, seconds):
        before, begun = page.renders, asyncio.get_running_loop().time()
        for k in range(count):
            page.c["alpha"].value = page.c["alpha"].max * (k + 1) / count
            await asyncio.sleep(seconds / count)
        took = asyncio.get_running_loop().time() - begun
        while page.latest.due:
            await asyncio.sleep(0.05)
        return page.renders - before, took
    drawn, took = asyncio.run(shake(50, 0.5))
    assert 1 <= drawn <= took / page.latest.wait_s + 2
    assert f"moved along {page.moves()[0].key} by {page.c['alpha'].max:+.2f}" in page.out["pictures"].value
    asyncio.run(shake(100, 1))
    held = psutil.Process().memory_info().rss
    asyncio.run(shake(500, 3))
    assert psutil.Process().memory_info().rss - held < 20 * 2**20 and len(page.history) <= 100


def test_what_is_on_the_screen_is_what_the_controls_say(page):
    page.c["alpha"].value, page.c["second"].value = page.c["alpha"].max / 2, 1
    page.c["alpha2"].value, page.c["layers"].value = -0.5, (1, 3)
    page.draw()
    first, second = page.moves()
    assert first.layers == [1, 2, 3] and first.alpha == pytest.approx(page.c["alpha"].max / 2, rel=0.02) and second.alpha == -0.5
    assert encode_picture(picture(page.nets, page.shown, [first, second])[0]) in decoded(page.out["pictures"].value)
    page.c["view"].value = "difference"
    page.draw()
    assert "difference" in page.out["pictures"].value
    page.undo()
    assert page.c["view"].value == "side by side"
    page.reset()
    assert page.c["alpha"].value == 0 and page.c["second"].value == -1 and page.c["layers"].value == (0, 7)


def decoded(text):
    import base64
    import re
    return [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)\"", text)]


def test_a_decision_is_there_after_a_reload_and_a_fault_keeps_what_was_typed(page, run):
    from dermgan.explore import Explorer
    page.c["decision"].value, page.c["name"].value, page.c["category"].value = "keep", "larger", "SV"
    page.save()
    assert "initials" in page.out["saved"].value and not page.path.exists()
    page.c["reviewer"].value = "AB"
    page.save()
    assert "Saved" in page.out["saved"].value
    again = Explorer(run, path=page.path)
    assert again.rows[0][1] == "reviewed" and again.c["name"].value == "larger" and again.c["decision"].value == "keep"
    page.path.chmod(0o444)
    page.c["name"].value = "much larger"
    page.save()
    assert "read-only" in page.out["saved"].value and page.c["name"].value == "much larger"
    page.path.chmod(0o644)
    page.path.write_text("directions: [")
    broken = Explorer(run, path=page.path)
    assert "cannot be read" in broken.notice and len(broken.rows) == 3 and page.path.read_text() == "directions: ["


def test_exported_files_are_the_picture_and_its_recipe(page):
    page.c["alpha"].value = 1.0
    page.export()
    png, recipe = decoded(page.out["files"].value)
    assert reproduce_picture(page.nets, recipe.decode()) == png and hashlib.sha256(png).hexdigest() in recipe.decode()


def test_without_a_kernel_there_is_a_strip(run, monkeypatch):
    from dermgan.explore import explorer
    monkeypatch.setenv("DERMGAN_MADE", os.devnull)
    shown = explorer(run).data
    assert shown.count("<img") == 3 and "nine steps" in shown and "src=\"http" not in shown


def test_large_pictures_use_the_strip(page, monkeypatch):
    monkeypatch.setattr(page.nets.g, "image_px", 512)
    page.draw()
    held = page.kept["frames"]
    page.c["alpha"].value = page.c["alpha"].max * 0.7
    page.draw()
    assert page.kept["frames"] is held and encode_picture(held[7]) in decoded(page.out["pictures"].value)


# ---- one's own folder, labels -------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for k in range(3):
        Image.fromarray(sample(1, 64, seed=k).images[0].transpose(1, 2, 0)).save(own / f"mole {k}.png")
    (own / "notes.txt").write_text("no picture")
    return own


def test_reviewed_directions_go_over_a_folder_with_provenance(run, folder, tmp_path):
    path, out = tmp_path / "directions.yaml", tmp_path / "out"
    with pytest.raises(DataMissing, match="No direction"):
        augment_folder(run, folder, out, path=path)
    candidate = review.load_candidates(run)[1]
    mine = Row(candidate.key, candidate.t.layers, 1.5, [-3.0, 3.0], candidate.t.direction, candidate.effects, "", [])
    decide(path, decoder_key(open_generator(run)), mine, word(category="GV"))
    frame = augment_folder(run, folder, out, path=path)
    assert set(frame.transformation) == {"GV"} and set(frame.status) == {"reviewed"} and len(frame) == 6
    assert sorted(frame.alpha.unique()) == [-1.5, 1.5] and frame.file.is_unique
    for made, source, sha in zip(frame.file, frame.source, frame.source_sha256):
        assert Image.open(out / made).size == (32, 32) and hashlib.sha256((folder / source).read_bytes()).hexdigest() == sha
    assert pd.read_csv(out / "rejected.csv").file.tolist() == ["notes.txt"]
    with pytest.raises(DataRefused, match="not empty"):
        augment_folder(run, folder, out, path=path)
    more = augment_folder(run, folder, tmp_path / "more", suggested=True, path=path)
    assert set(more.status) == {"reviewed", "suggested"} and len(more) == 12


def test_the_command_says_what_is_missing(run, folder, tmp_path, capsys):
    assert main(["augment", str(folder), "--out", str(tmp_path / "out"), "--run", str(run.folder)]) == 2
    assert "No direction of this generator is reviewed" in capsys.readouterr().err
    assert main(["augment", str(folder / "none"), "--out", str(tmp_path / "out"), "--run", str(run.folder), "--suggested"]) == 2
    assert "not a folder" in capsys.readouterr().err
    assert main(["explore", "--run", str(tmp_path)]) == 2


def test_the_command_merges_two_files(tmp_path, capsys):
    for name, who, said in (("a", "AB", "keep"), ("b", "CD", "reject")):
        save_review(tmp_path / f"{name}.yaml", Review("g1", {"sefa 3 @ 0-2": row(reviews=[word(who, said)])}))
    out = tmp_path / "both.yaml"
    assert main(["merge", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "--out", str(out)]) == 0
    assert "AB, CD: kappa" in capsys.readouterr().out and verdict(load_review(out).rows["sefa 3 @ 0-2"]) == "unsure"
    out.write_text("[")
    assert main(["merge", str(out), str(tmp_path / "b.yaml"), "--out", str(tmp_path / "c.yaml")]) == 2


def test_flips_are_counted_as_by_hand():
    g = generator()
    ws, none = draw_codes(g, 12, 0), torch.zeros(12, 0)
    inverted = Inversion("generated", ws, none, torch.zeros(12), torch.zeros(12), 0.0, {})
    classify = lambda x: torch.stack([x.mean((1, 2, 3)), torch.full((len(x),), float(render(g, ws).mean()))], 1)
    t = gather(g, "sefa", 1)["all"][0]
    found = label_flips(Nets(g), classify, inverted, {"BCV": t, "GV": None}, steps=(1.0, 3.0))
    mean = float(render(g, ws).mean())
    bright = lambda codes: np.array([float(x.mean()) > mean for x in render(g, codes)])
    for k, value in zip((1.0, 3.0), found.value):
        hits = sum((bright(move(ws, t.direction, s * k * t.alpha, t.layers)) != bright(ws)).sum() for s in (1, -1))
        assert value == pytest.approx(hits / 24)
    assert found.n.tolist() == [24, 24] and [bool(w) for w in found.warning] == [low > 0.1 for low in found.low]
    from scipy.stats import binomtest
    low, high = binomtest(7, 24).proportion_ci(0.95, method="wilson")
    assert wilson(7, 24) == pytest.approx((low, high), abs=1e-4)


def test_a_review_outlives_the_promotion_of_a_run(run, tmp_path):
    from dermgan.publish import promote
    folder = tmp_path / "figures" / "smoke"
    folder.mkdir(parents=True)
    save_review(folder / "directions.yaml", Review("g1", {"sefa 3 @ 0-2": row(reviews=[word()])}))
    (folder / "old.csv").write_text("gone\n")
    before = (folder / "directions.yaml").read_bytes()
    promote(run, tmp_path)
    assert (folder / "directions.yaml").read_bytes() == before and not (folder / "old.csv").exists()
    assert "directions.yaml" in json.loads((folder / "PROVENANCE.json").read_text())["files"]
