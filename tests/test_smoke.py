"""The smoke reproduction, through the real command and offline, is the notebooks' own test (R24, R26)."""
import base64
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

matplotlib.use("Agg")
TOP = Path(__file__).resolve().parent.parent
FIGURES = ["fig1_pipeline", "fig2_samples", "fig4_transformations", "figA1_transformations", "fig5_recall", "fig6_confusion",
           "fig3_hyperstyle", "fig7_crp", "figB1_crp_mel", "figD1_pcx_baseline", "figD2_pcx_augmented", "fig_distractors", "fig_plant",
           "fig_faithfulness", "fig_lrp_sanity"]
TABLES = ["table1_lpips", "table2_balanced_accuracy", "table3_auc", "table_dataset", "table_gan", "table_inversion",
          "table_inversion_methods", "table_directions", "table_controls", "table_distractors", "table_plant"]
KEYS = {"table1_lpips": ["transformation", "metric"], "table2_balanced_accuracy": ["architecture", "filtered", "set"],
        "table3_auc": ["set", "class"], "table_gan": ["metric"], "table_inversion": ["method", "metric"], "table_inversion_methods": ["method", "metric"],
        "table_directions": ["direction", "layers", "attribute"], "table_dataset": ["set", "class"],
        "table_controls": ["control", "metric"], "table_distractors": ["model", "class", "region"], "table_plant": ["method", "network", "metric"]}


@pytest.fixture(scope="session")
def smoke(reproduce):
    "The run's folder, made by the real command with every connection but loopback blocked."
    done = reproduce("--profile", "smoke")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    from dermgan.core import resolve_run
    held = {name: os.environ.pop(name) for name in ("DERMGAN_DATA", "DERMGAN_WEIGHTS") if name in os.environ}
    try:
        return resolve_run("smoke").folder
    finally:
        os.environ.update(held)


def test_the_block_reaches_the_kernels(reproduce):
    import subprocess, sys
    probe = ("import urllib.request as u\ntry:\n    u.urlopen('http://example.com', timeout=3)\nexcept OSError as e:\n    print(e)")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TOP / "tests" / "offline"), str(TOP)])}
    said = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=env).stdout
    assert "the tests are offline" in said


def test_every_notebook_ran(smoke):
    ran = {p.stem for p in smoke.glob("nbs/*.ipynb")}
    assert ran == {p.stem for p in (TOP / "nbs").glob("*.ipynb")}
    for path in smoke.glob("nbs/*.ipynb"):
        book = json.loads(path.read_text())
        outputs = [o for c in book["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
        assert not [o for o in outputs if o["output_type"] == "error"], path.name
        assert "widgets" not in book["metadata"] and "papermill" not in book["metadata"]
        assert len(path.read_bytes()) <= 400 * 1024, path.name


def test_every_lesson_shows_something(smoke):
    silent = []
    for path in smoke.glob("nbs/*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            code = "".join(cell["source"])
            body = [line for line in code.splitlines() if line and not line.startswith(("#", " ", ")"))]
            defines = code.startswith("#|") or set(cell["metadata"].get("tags", [])) & {"parameters", "injected-parameters"}
            imports = all(line.startswith(("import ", "from ", "plain_style(")) for line in body)
            if cell["cell_type"] == "code" and not defines and not imports and not cell["outputs"]:
                silent.append(f"{path.stem}: {body[-1] if body else code}")
    assert silent == []


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_there_with_its_data_and_words(smoke, name):
    folder = smoke / "figures"
    with Image.open(folder / f"{name}.png") as picture:
        assert picture.width >= 300 and np.asarray(picture.convert("L")).std() > 3
    assert len(pd.read_csv(folder / f"{name}.csv")) >= 1
    assert len((folder / f"{name}.txt").read_text().strip()) >= 40


def test_each_picture_has_its_data_and_words(smoke):
    pictures = sorted(smoke.glob("figures/*.png"))
    assert len(pictures) >= len(FIGURES)
    for path in pictures:
        assert path.with_suffix(".csv").is_file() and len(path.with_suffix(".txt").read_text().strip()) >= 40, path.name
        assert b"Software" not in path.read_bytes()[:400], path.name


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_tidy(smoke, name):
    frame = pd.read_csv(smoke / "tables" / f"{name}.csv")
    assert set(KEYS[name]) <= set(frame.columns) and "value" in frame and len(frame) >= 1
    assert pd.api.types.is_numeric_dtype(frame["value"])
    if {"low", "high"} <= set(frame):
        known = frame.dropna(subset=["value", "low", "high"])
        assert (known["low"] <= known["value"] + 1e-6).all() and (known["value"] <= known["high"] + 1e-6).all()


def test_figures_can_be_drawn_again_from_their_data(smoke):
    recall = pd.read_csv(smoke / "figures" / "fig5_recall.csv")
    assert recall["value"].between(0, 1).all() and {"set", "class"} <= set(recall)
    from dermgan.results import draw_confusion, draw_recall
    for draw, name in ((draw_recall, "fig5_recall"), (draw_confusion, "fig6_confusion")):
        fig = draw(pd.read_csv(smoke / "figures" / f"{name}.csv"))
        assert fig.axes and any(ax.has_data() for ax in fig.axes)


def test_balanced_accuracy_stands_beside_chance_and_colour(smoke):
    frame = pd.read_csv(smoke / "tables" / "table2_balanced_accuracy.csv")
    assert {"chance", "colour_histogram"} <= set(frame["architecture"])
    assert frame.loc[frame["architecture"] == "chance", "value"].sub(1 / 7).abs().max() < 1e-3


def test_without_weights_nothing_is_called_fid_or_lpips_alone(smoke):
    gan = pd.read_csv(smoke / "tables" / "table_gan.csv")
    measured = gan[gan["value"].notna()]
    assert not measured["metric"].str.contains(r"\bFID\b").any() and measured["metric"].str.contains("FD-random").any()
    lpips = pd.read_csv(smoke / "tables" / "table1_lpips.csv")
    assert "paper" not in lpips or lpips["paper"].isna().all()


class Page(HTMLParser):
    "Collects what a page refers to."

    def __init__(self):
        super().__init__()
        self.images, self.alts, self.outside = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            self.images.append(attrs["src"])
            self.alts.append(attrs.get("alt", ""))
        if tag in ("script", "link", "iframe"):
            self.outside.append(tag)


def test_the_report_is_one_offline_page(smoke):
    text = (smoke / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert len(page.images) >= 5 and not page.outside and all(len(alt) >= 40 for alt in page.alts)
    for source in page.images:
        head, data = source.split(",", 1)
        magic = {"data:image/png;base64": b"\x89PNG", "data:image/jpeg;base64": b"\xff\xd8\xff"}[head]
        assert base64.b64decode(data).startswith(magic)
    assert "Not a medical device" in text and "phantom" in text and str(TOP) not in text
    assert re.search(r"balanced accuracy: real images only", text)


def test_nothing_that_a_run_publishes_names_this_machine(smoke):
    for path in [*smoke.glob("nbs/*.ipynb"), *smoke.glob("tables/*.csv"), *smoke.glob("figures/*.csv"), smoke / "report.html"]:
        assert str(TOP) not in path.read_text(errors="replace"), path.name


def test_a_second_run_does_nothing(smoke, reproduce):
    before = {p: p.stat().st_mtime_ns for p in smoke.glob("nbs/*.ipynb")}
    done = reproduce("--profile", "smoke")
    assert done.returncode == 0 and "started" not in done.stdout and "report.html" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in smoke.glob("nbs/*.ipynb")} == before
    assert "balanced accuracy: real images only" in done.stdout


def test_the_summary_names_ours_and_the_papers(smoke):
    from dermgan.core import read_run
    from dermgan.report import summary_text
    said = summary_text(read_run(smoke))
    assert "0.821" in said and "ours" in said and "paper" in said


def test_a_promoted_run_carries_its_provenance(smoke, tmp_path):
    from dermgan.core import file_sha256, read_run
    from dermgan.publish import promote
    promote(read_run(smoke), tmp_path)
    folder = tmp_path / "figures" / "smoke"
    facts = json.loads((folder / "PROVENANCE.json").read_text())
    assert {"profile", "seed", "commit", "dirty", "environment", "stages", "files"} <= set(facts)
    assert set(facts["files"]) == {p.name for p in folder.iterdir()} - {"PROVENANCE.json"}
    assert all(file_sha256(folder / name) == entry["sha256"] for name, entry in facts["files"].items())
    assert str(TOP) not in json.dumps(facts) and {"generator.safetensors", "MODEL_CARD.md"} <= set(facts["files"])
    assert all((folder / f"{name}.csv").is_file() for name in TABLES)
    from dermgan.stylegan2 import load_generator
    import torch
    g = load_generator(folder / "generator.safetensors")
    images = g(torch.zeros(1, g.z_dim) + 0.1, noise="const")
    assert images.shape == (1, 3, 32, 32) and torch.isfinite(images).all() and images.dtype == torch.float32
