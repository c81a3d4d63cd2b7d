"""The explorer in headless Chromium: JupyterLab and Voila, by mouse and by keys (skipped where Chromium is not installed)."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from dermgan.encode import decoder_key
from dermgan.explore import MESSAGE_BYTES, explore_notebook
from dermgan.gan import open_generator
from dermgan.review import load_review
from test_explore import file, run  # noqa: F401  the real run of the explorer's tests

TOP = Path(__file__).resolve().parent.parent
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt install chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url, process, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise TimeoutError(url)


@pytest.fixture
def serve(run, tmp_path):
    "Start a server for a folder; ended with the test."
    started = []
    env = {k: v for k, v in os.environ.items() if k != "DERMGAN_MADE"}
    env |= {"DERMGAN_RUN": str(run.folder), "PYTHONPATH": os.pathsep.join([str(TOP / "tests" / "offline"), str(TOP)]), "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "OMP_NUM_THREADS": "1",
            "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"), "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "ws")}

    def start(words, url):
        log = open(tmp_path / "server.log", "w")
        started.append(subprocess.Popen([sys.executable, "-m", *words], cwd=tmp_path, env=env, stdout=log, stderr=log))
        wait_for(url, started[-1])
    yield start
    for process in started:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture
def browser(tmp_path):
    with playwright.sync_playwright() as p:
        context = p.chromium.launch_persistent_context(str(tmp_path / "profile"), executable_path=CHROMIUM, headless=True, args=FLAGS,
                                                       viewport={"width": 1280, "height": 900})
        page = context.pages[0]
        page.set_default_timeout(90_000)
        yield page
        context.close()


def review_notebook(folder, review):
    "The page's notebook, its review in a folder of the test."
    book = json.loads(explore_notebook())
    code = book["cells"][1]["source"].replace("explorer(read_run(", "Explorer(read_run(").replace("import explorer", "import Explorer")
    book["cells"][1]["source"] = code[:-1] + f", path=Path({str(review)!r})).page"
    path = folder / "explore.ipynb"
    path.write_text(json.dumps(book))
    return path


def moved(page):
    return page.locator("img[alt*='moved along']")


def changes(page, before):
    playwright.expect(moved(page)).not_to_have_attribute("src", before)
    return moved(page).get_attribute("src")


def upload(page, path):
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload a picture").click()
    chooser.value.set_files(str(path))


def look_move_upload_and_decide(page, tmp_path):
    "What a reviewer does; the decision's name is typed in by keys."
    moved(page).wait_for()
    first = moved(page).get_attribute("src")
    handle = page.locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    handle.focus()
    for _ in range(12):
        page.keyboard.press("ArrowRight")
    second = changes(page, first)
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"] + box["height"] / 2, steps=6)
    page.mouse.up()
    third = changes(page, second)
    page.get_by_label("α typed", exact=True).fill("0")
    page.keyboard.press("Tab")
    changes(page, third)
    page.get_by_label("Name", exact=True).fill("larger")
    page.get_by_label("Initials", exact=True).fill("AB")
    page.get_by_role("button", name="keep").click()
    page.get_by_role("button", name="Save decision").click()
    page.get_by_role("status").filter(has_text="Saved: keep").wait_for()
    page.get_by_role("button", name="upload", exact=True).click()
    picture = tmp_path / "mole.png"
    from PIL import Image
    picture.write_bytes(file(Image.new("RGB", (90, 70), (220, 170, 150))))
    upload(page, picture)
    page.locator("img[alt*='mole.png']").first.wait_for()
    large = tmp_path / "large.png"
    large.write_bytes(bytes(12 * 2**20))
    upload(page, large)
    page.get_by_role("status").filter(has_text="12.0 MB").wait_for()
    assert page.locator("img[alt*='mole.png']").count() >= 1


def test_voila_shows_the_explorer_and_keeps_a_decision(serve, browser, run, tmp_path):
    review, port = tmp_path / "directions.yaml", free_port()
    book = review_notebook(tmp_path, review)
    settings = json.dumps({"websocket_max_message_size": MESSAGE_BYTES})
    serve(["voila", str(book), f"--port={port}", "--Voila.ip=127.0.0.1", "--no-browser", f"--Voila.tornado_settings={settings}"],
          f"http://127.0.0.1:{port}/")
    browser.goto(f"http://127.0.0.1:{port}/")
    look_move_upload_and_decide(browser, tmp_path)
    assert browser.get_by_text("Error displaying widget").count() == 0
    kept = load_review(review)
    assert kept.generator == decoder_key(open_generator(run))
    assert [said["name"] for row in kept.rows.values() for said in row.reviews] == ["larger"]
    browser.reload()
    moved(browser).wait_for()
    assert browser.get_by_label("Name", exact=True).input_value() == "larger"
    entry = browser.get_by_label("Direction", exact=True).locator("option:checked").inner_text().replace("\xa0", " ")
    assert "larger" in entry and "reviewed: keep" in entry
    browser.set_viewport_size({"width": 380, "height": 800})
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= 420
    out = os.environ.get("DERMGAN_SCREENSHOTS")
    if out:
        browser.screenshot(path=str(Path(out) / "explorer_narrow.png"), full_page=True)
        browser.set_viewport_size({"width": 1280, "height": 900})
        browser.screenshot(path=str(Path(out) / "explorer.png"), full_page=True)


def test_jupyterlab_runs_the_explorer_by_mouse_and_keys(serve, browser, run, tmp_path):
    port, review = free_port(), tmp_path / "directions.yaml"
    review_notebook(tmp_path, review)
    serve(["jupyter", "lab", f"--port={port}", "--ServerApp.ip=127.0.0.1", "--no-browser", "--allow-root", "--IdentityProvider.token=",
           f"--ServerApp.root_dir={tmp_path}",
           f"--ServerApp.tornado_settings={json.dumps({'websocket_max_message_size': MESSAGE_BYTES})}"], f"http://127.0.0.1:{port}/api")
    browser.goto(f"http://127.0.0.1:{port}/lab/tree/explore.ipynb")
    browser.locator(".jp-Notebook").wait_for()
    browser.get_by_text("| Idle").first.wait_for()
    browser.get_by_role("menuitem", name="Run", exact=True).click()
    browser.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    look_move_upload_and_decide(browser, tmp_path)
    assert len(load_review(review).rows) == 1


def test_the_report_moves_without_a_kernel_and_offline(browser, run, tmp_path, monkeypatch):
    from dataclasses import replace
    import io
    from PIL import Image
    from dermgan.frames import slider_html
    from dermgan.report import report_html
    report = replace(run, folder=tmp_path / "run")
    frames = [io.BytesIO() for _ in range(3)]
    for frame, colour in zip(frames, ("maroon", "peru", "gold")):
        Image.new("RGB", (32, 32), colour).save(frame, "JPEG")
    report.path("figures", "explorer_slider.html").write_text(
        slider_html({"SV <wider>": [f.getvalue() for f in frames]}, [-1, 0, 1], "a lesion"))
    shutil.copy(TOP / "nbs" / "09_frames.ipynb", report.path("nbs", "09_frames.ipynb"))
    facts = {"seconds": 1, "peak_mib": 1, "made": ["figures/explorer_slider.html"]}
    report.path("logs", "09_frames.json").write_text(json.dumps(facts))
    page = tmp_path / "report.html"
    page.write_text(report_html(report))
    said, asked = [], []
    browser.on("console", lambda message: said.append(message.text))
    browser.on("pageerror", lambda error: said.append(str(error)))
    browser.on("request", lambda request: asked.append(request.url))
    browser.context.set_offline(True)
    browser.goto(page.as_uri())
    slider = browser.get_by_label("steps along SV <wider>")
    slider.focus()
    seen = []
    for key in ("", "ArrowRight", "ArrowLeft", "ArrowLeft"):
        if key:
            browser.keyboard.press(key)
        seen.append(browser.locator("figure.slide img:visible").get_attribute("alt"))
    assert [alt.split("step ")[1] for alt in seen] == ["+0", "+1", "+0", "-1"]
    assert browser.locator("figure.slide output").inner_text() == "-1"
    assert said == [] and [url for url in asked if not url.startswith(("file:", "data:"))] == []
