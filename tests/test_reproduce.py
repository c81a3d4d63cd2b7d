"""Order, staleness, resume, refusals and the package: on a toy repository with the real machinery (R21, R22, R23)."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import pytest

from dermgan import publish, report, reproduce as command, stages

TOP = Path(__file__).resolve().parent.parent
TOY = {  # notebook -> its code; each notes in order.txt that it ran
    "01_data": "from dermgan.toy_data import numbers\ntable(run, 'table_dataset', numbers())",
    "04_stylegan2": "from dermgan.toy_net import width\ntable(run, 'table_net', pd.DataFrame({'value': [width()]}))",
    "05_gan": """
import time
from dermgan.toy_data import numbers
state = run.path('ckpt', 'step.json')
step = json.loads(state.read_text())['step'] if state.exists() else 0
with open(run.path('began.txt'), 'a') as file: print(step, file=file)
for step in progress(range(step, int(Path('../steps').read_text())), what='toy'):
    time.sleep(0.1)
    write_text(state, json.dumps({'step': step + 1}))
table(run, 'table_gan', pd.DataFrame({'metric': ['FD-toy'], 'value': [1.0]}))""",
    "06_factorize": "table(run, 'table_directions', pd.DataFrame({'value': [2.0]}))",
}
SETUP = """import json, pandas as pd
from pathlib import Path
from dermgan.core import open_run, progress, table, write_text
run = open_run(profile, seed)
with open(run.path('order.txt'), 'a') as file: print(NAME, file=file)
"""


def notebook(path: Path, name: str, code: str) -> None:
    book = nbformat.v4.new_notebook()
    book.metadata = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    cell = nbformat.v4.new_code_cell
    parameters = cell('profile = "quick"\nseed = 0', metadata={"tags": ["parameters"]})
    book.cells = [nbformat.v4.new_markdown_cell(f"# {name}\n\nA toy."), parameters,
                  cell(SETUP.replace("NAME", repr(name))), cell(code)]
    nbformat.write(book, path)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "A repository with the real library and Snakefile, and four notebooks that take no time."
    folder = tmp_path_factory.mktemp("toy")
    for name in ("Snakefile", "settings.ini", "data_manifest.yaml"):
        shutil.copy(TOP / name, folder / name)
    shutil.copytree(TOP / "dermgan", folder / "dermgan", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "nbs").mkdir()
    (folder / "steps").write_text("2")
    (folder / "dermgan" / "toy_data.py").write_text("import pandas as pd\n\ndef numbers():\n    return pd.DataFrame({'value': [1]})\n")
    (folder / "dermgan" / "toy_net.py").write_text("from .toy_base import BASE\n\ndef width():\n    return BASE\n")
    (folder / "dermgan" / "toy_base.py").write_text("BASE = 8\n")
    for name, code in TOY.items():
        notebook(folder / "nbs" / f"{name}.ipynb", name, code)
    return folder


def run_of(toy: Path) -> Path:
    return next((toy / "runs").glob("smoke-*-s0"))


def ran(toy: Path) -> list[str]:
    "Which notebooks ran since the last look, in order."
    path = run_of(toy) / "order.txt"
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def test_order_staleness_and_missing_files(toy, reproduce):
    first = reproduce("--profile", "smoke", top=toy)
    assert first.returncode == 0, first.stdout + first.stderr
    names = ran(toy)
    assert sorted(names) == sorted(TOY) and names.index("05_gan") > max(names.index("01_data"), names.index("04_stylegan2"))
    assert names[-1] == "06_factorize"

    again = reproduce("--profile", "smoke", top=toy)
    assert again.returncode == 0 and ran(toy) == []

    for path in [*toy.glob("nbs/*.ipynb"), *toy.glob("dermgan/*.py")]:
        os.utime(path)
    book = nbformat.read(toy / "nbs" / "01_data.ipynb", 4)
    book.cells[0].source += " And more prose."
    book.cells[3].outputs = [nbformat.v4.new_output("stream", text="an output")]
    nbformat.write(book, toy / "nbs" / "01_data.ipynb")
    data = toy / "dermgan" / "toy_data.py"
    data.write_text("# a comment\n" + data.read_text())
    prose = reproduce("--profile", "smoke", top=toy)
    assert prose.returncode == 0 and ran(toy) == [], "dates, outputs, prose and comments make nothing stale"

    (toy / "dermgan" / "toy_base.py").write_text("BASE = 16\n")
    plan = reproduce("--profile", "smoke", "--dry-run", top=toy)
    assert "04_stylegan2: its code changed" in plan.stdout and "01_data" not in plan.stdout and ran(toy) == []
    edited = reproduce("--profile", "smoke", top=toy)
    assert edited.returncode == 0 and ran(toy) == ["04_stylegan2", "05_gan", "06_factorize"]

    (run_of(toy) / "tables" / "table_gan.csv").unlink()
    lacking = reproduce("--profile", "smoke", top=toy)
    assert lacking.returncode == 0 and ran(toy) == ["05_gan", "06_factorize"]
    log = json.loads((run_of(toy) / "logs" / "05_gan.json").read_text())
    assert log["seconds"] > 0 and log["peak_mib"] > 20 and "tables/table_gan.csv" in log["made"]


def start(toy: Path, *words: str) -> subprocess.Popen:
    "Begin a run that hears Ctrl-C, also where the tests themselves were put in the background and do not."
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TOP / "tests" / "offline"), str(toy)])}
    return subprocess.Popen([sys.executable, "-m", "dermgan.reproduce", *words], cwd=toy, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def wait_for_step(run: Path, step: int) -> None:
    state, end = run / "ckpt" / "step.json", time.time() + 60
    while time.time() < end:
        if state.exists() and json.loads(state.read_text())["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError("the toy stage never began")


def wait_for_quiet(run: Path) -> int:
    "The last step, once nobody writes any more."
    state, seen = run / "ckpt" / "step.json", -1
    for _ in range(60):
        step = json.loads(state.read_text())["step"]
        if step == seen:
            return step
        seen = step
        time.sleep(1.5)
    raise AssertionError("the stage outlived the command that began it")


@pytest.mark.parametrize("end", ["kill", "interrupt"])
def test_a_stopped_run_goes_on_where_it_was(toy, reproduce, end):
    (toy / "steps").write_text("400")
    run = toy / "runs" / command.resolve_run("smoke", root=toy / "unused").folder.name
    for path in ("ckpt/step.json", "nbs/05_gan.ipynb", "began.txt"):
        (run / path).unlink(missing_ok=True)
    going = start(toy, "--profile", "smoke")
    wait_for_step(run, 5)
    if end == "kill":
        going.kill()
    else:
        os.killpg(going.pid, signal.SIGINT)
    _, said = going.communicate(timeout=60)
    last = wait_for_quiet(run)
    assert 5 <= last < 400 and not (run / "nbs" / "05_gan.ipynb").exists()
    if end == "interrupt":
        assert going.returncode == 130 and "Go on with: ./reproduce.sh --profile smoke" in said
    (toy / "steps").write_text(str(last + 2))
    done = reproduce("--profile", "smoke", top=toy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "began.txt").read_text().split() == ["0", str(last)] and (run / "nbs" / "05_gan.ipynb").exists()
    assert not list(run.rglob(".*.tmp-*"))
    ran(toy)


def test_a_failed_notebook_is_kept_and_told(toy, reproduce):
    path = toy / "nbs" / "05_gan.ipynb"
    before = path.read_bytes()
    notebook(path, "05_gan", "from dermgan.core import DataMissing\n"
             "raise DataMissing('No images.', 'The folder is empty.', 'Run: dermgan fetch ham10000')")
    done = reproduce("--profile", "smoke", "--seed", "0", top=toy)
    path.write_bytes(before)
    assert done.returncode == 1
    for part in ("05_gan stopped in code cell", "DataMissing: No images.", "The folder is empty.",
                 "Run: dermgan fetch ham10000", "05_gan.failed.ipynb", "go on with: ./reproduce.sh --profile smoke --seed 0"):
        assert part in done.stderr, part
    run = run_of(toy)
    kept = nbformat.read(run / "nbs" / "05_gan.failed.ipynb", 4)
    assert any(o.output_type == "error" for c in kept.cells if c.cell_type == "code" for o in c.outputs)
    assert not (run / "nbs" / "05_gan.ipynb").exists() and "06_factorize" not in ran(toy)
    mended = reproduce("--profile", "smoke", top=toy)
    assert mended.returncode == 0 and ran(toy) == ["05_gan", "06_factorize"]
    assert not (run / "nbs" / "05_gan.failed.ipynb").exists()


@pytest.mark.parametrize("words, allowed", [
    (["--profile", "qick"], ["smoke, quick, ham, paper"]), (["--set", "gan_king=3"], ["gan_king", "gan_kimg"]),
    (["--set", "gan_kimg=many"], ["gan_kimg", "float"]), (["--set", "precision=fp8"], ["fp32 | bf16"]),
    (["--set", "image_px"], ["KEY=VALUE"]), (["--until", "99_moon"], ["00_core"]), (["--data", "nowhere"], ["nowhere", "data"])])
def test_what_is_not_allowed_ends_with_2_and_the_list(words, allowed, capsys):
    before = set((TOP / "runs").glob("quick-*"))
    assert command.main(["run", *words]) == 2 and set((TOP / "runs").glob("quick-*")) == before
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 3 and all(part in said for part in allowed)


def test_an_unknown_option_or_number_ends_with_2(capsys):
    for words in (["--colour", "red"], ["--seed", "one"]):
        with pytest.raises(SystemExit) as caught:
            command.main(["run", *words])
        assert caught.value.code == 2 and "usage" in capsys.readouterr().err


def test_a_parameter_that_no_notebook_takes_is_an_error(toy, reproduce):
    path = toy / "nbs" / "06_factorize.ipynb"
    before = path.read_bytes()
    path.write_text(path.read_text().replace('seed = 0', 'sead = 0'))
    done = reproduce("--profile", "smoke", top=toy)
    path.write_bytes(before)
    assert done.returncode == 2 and "sead" in done.stderr and "Allowed: profile, seed." in done.stderr and ran(toy) == []


def test_help_names_every_option(reproduce):
    said = reproduce("--help")
    assert said.returncode == 0
    for option in ("--profile", "--data", "--weights", "--seed", "--set", "--until", "--cores", "--dry-run", "--promote",
                   "--from", "--restart", "test", "lab"):
        assert option in said.stdout


def test_the_shell_command_passes_its_words_on():
    done = subprocess.run(["bash", str(TOP / "reproduce.sh"), "--profile", "qick"], capture_output=True, text=True,
                          env=os.environ | {"DERMGAN_VENV": sys.prefix}, cwd="/")
    assert done.returncode == 2 and "smoke, quick, ham, paper" in done.stderr


def test_two_commands_never_work_on_one_run(toy, reproduce):
    import fcntl
    (run_of(toy) / ".lock").touch()
    with open(run_of(toy) / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = reproduce("--profile", "smoke", top=toy)
    assert done.returncode == 2 and "being worked on" in done.stderr


def test_restart_begins_again_and_keeps_the_settings(toy):
    run = command.resolve_run("smoke", 5, root=toy / "runs")
    run.path("ckpt", "gan.pt").touch()
    command.restart(run)
    assert [p.name for p in run.folder.iterdir()] == ["profile.json"]


def test_restart_from_a_notebook_keeps_what_stands_before_it(toy):
    run = command.resolve_run("smoke", 6, root=toy / "runs")
    made = {"05_gan": "ckpt/gan.pt", "07_invert": "ckpt/inversions.pt", "12_results": "tables/table2.csv"}
    for name, file in made.items():
        run.path(*file.split("/")).touch()
        run.path("nbs", f"{name}.ipynb").touch()
        run.path("logs", f"{name}.made").write_text(f"{run.folder / file}\n")
    run.path("ckpt", "inversions.pt.prev").touch()
    command.restart(run, "07_invert")
    left = {str(p.relative_to(run.folder)) for p in run.folder.rglob("*") if p.is_file()}
    assert left == {"profile.json", "ckpt/gan.pt", "nbs/05_gan.ipynb", "logs/05_gan.made"}


@pytest.mark.parametrize("told, count", [("", 0), ("0", 1), ("2,3", 2)])
def test_the_gpus_of_a_machine_are_counted_without_torch(told, count, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    assert stages.gpus() == count


def test_each_cell_has_a_gpu_to_itself_until_it_ends(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with stages.own_gpu(tmp_path) as first:
        with stages.own_gpu(tmp_path) as second, stages.own_gpu(tmp_path) as third:
            assert (first, second, third) == ({"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}, {})
        with stages.own_gpu(tmp_path) as again:
            assert again == second
    held = subprocess.Popen([sys.executable, "-c", "import sys, time; from pathlib import Path; from dermgan import stages\n"
                             "with stages.own_gpu(Path(sys.argv[1])) as shown: print(shown, flush=True); time.sleep(60)", str(tmp_path)],
                            stdout=subprocess.PIPE, text=True)
    assert held.stdout.readline() == "{'CUDA_VISIBLE_DEVICES': '3'}\n"
    with stages.own_gpu(tmp_path) as other:
        assert other == {"CUDA_VISIBLE_DEVICES": "5"}
    held.kill()
    held.wait()
    with stages.own_gpu(tmp_path) as freed:
        assert freed == {"CUDA_VISIBLE_DEVICES": "3"}
    with pytest.raises(BlockingIOError, match="the cell's own"), stages.own_gpu(tmp_path):
        raise BlockingIOError("the cell's own")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with stages.own_gpu(tmp_path) as none:
        assert none == {}


CELLS = ("baseline-plain", "2k-plain", "2k-filter", "random-6k-plain", "clustered-6k-plain")


@pytest.mark.parametrize("stage, left", [("10_augment", {0}), ("10_controls", {0, 1, 2, 4}), ("11_selection", {0, 1, 2, 3}),
                                         ("11_classify", set()), ("02_phantom", set()), ("12_results", {0, 1, 2, 3, 4})])
def test_restart_keeps_the_classifiers_that_do_not_wait(stage, left, tmp_path):
    run = command.resolve_run("smoke", 8, root=tmp_path)
    for name in CELLS:
        run.path("ckpt", "classify", f"a-{name}-s0.json").touch()
        run.path("logs", f"classify-a-{name}-s0.made").write_text(f"{run.folder}/ckpt/classify/a-{name}-s0.json\n")
    command.restart(run, stage)
    assert {p.stem for p in run.folder.glob("ckpt/classify/*.json")} == {f"a-{CELLS[k]}-s0" for k in left}


@pytest.mark.parametrize("words, again", [
    (["--restart"], "./reproduce.sh"), (["--restart", "05_gan", "--seed", "1"], "./reproduce.sh --seed 1"),
    (["--restart=gan", "--until", "gan"], "./reproduce.sh --until gan"), (["--seed", "1", "--restart"], "./reproduce.sh --seed 1")])
def test_the_command_to_go_on_does_not_restart_again(monkeypatch, capsys, words, again):
    monkeypatch.setattr(command, "reproduce", lambda options, extra: 1)
    assert command.run_command(words) == 1
    assert capsys.readouterr().err.strip().endswith(f"go on with: {again}")


def test_promotion_copies_outputs_only_where_the_code_is_the_same(toy):
    run, nbs = command.resolve_run("quick", root=toy / "runs"), toy / "promoted"
    nbs.mkdir()
    for name in ("01_data", "06_factorize"):
        notebook(nbs / f"{name}.ipynb", name, TOY[name])
        book = nbformat.read(nbs / f"{name}.ipynb", 4)
        book.cells.insert(2, nbformat.v4.new_code_cell('profile = "quick"', metadata={"tags": ["injected-parameters"]}))
        book.cells[-1].outputs = [nbformat.v4.new_output("stream", name="stderr", text="a warning"),
                                  nbformat.v4.new_output("execute_result", {"text/plain": "shown"}, execution_count=9)]
        nbformat.write(book, run.path("nbs", f"{name}.ipynb"))
    changed = nbformat.read(nbs / "06_factorize.ipynb", 4)
    changed.cells[-1].source += "\n1"
    nbformat.write(changed, nbs / "06_factorize.ipynb")
    left = publish.copy_outputs(run, nbs)
    assert len(left) == 1 and left[0].startswith("06_factorize.ipynb")
    cells = nbformat.read(nbs / "01_data.ipynb", 4).cells
    assert len(cells) == 4 and [o.output_type for o in cells[-1].outputs] == ["execute_result"]
    assert cells[-1].outputs[0].execution_count is None
    assert publish.copy_outputs(run, nbs, limit_kb=0)[0].startswith("01_data.ipynb")


def test_the_report_needs_no_network_and_escapes_what_it_shows(tmp_path):
    run = command.resolve_run("smoke", root=tmp_path)
    notebook(run.path("nbs", "05_gan.ipynb"), "05_gan", "1")
    run.path("tables", "table_gan.csv").write_text("metric,value,low,high,n,paper\n<b>FD</b>,1.5,1,2,10,3.7\n")
    run.path("figures", "fig2_samples.png").write_bytes(b"PNG")
    run.path("figures", "fig2_samples.txt").write_text("Samples & <more> of them, in four rows of eight.\n")
    run.path("logs", "05_gan.json").write_text(json.dumps(
        {"seconds": 3, "peak_mib": 9, "output": "nbs/05_gan.ipynb", "made": ["figures/fig2_samples.png", "tables/table_gan.csv"]}))
    page = report.report_html(run)
    assert "&lt;b&gt;FD&lt;/b&gt;" in page and "Samples &amp; &lt;more&gt;" in page and "1 to 2" in page and "3.7" in page
    assert "<script" not in page and 'src="http' not in page and "@import" not in page
    assert str(tmp_path) not in page


def test_digests_follow_imports_and_the_data_files_that_code_names(tmp_path):
    modules = tmp_path / "dermgan"
    modules.mkdir()
    (modules / "a.py").write_text("from . import b\n")
    (modules / "b.py").write_text('def f():\n    from .c import g\n    return open("numbers.yaml")\n')
    (modules / "c.py").write_text("def g():\n    return 1\n")
    (modules / "numbers.yaml").write_text("x: 1\n")
    first = stages.code_digest("from dermgan.a import b", modules)
    for name, text in (("c.py", "def g():\n    return 2\n"), ("numbers.yaml", "x: 2\n")):
        before = (modules / name).read_text()
        (modules / name).write_text(text)
        assert stages.code_digest("from dermgan.a import b", modules) != first, name
        (modules / name).write_text(before)
    assert stages.code_digest("from dermgan.a import b", modules) == first
    assert stages.imported_modules("import dermgan.x\nfrom dermgan import y\nfrom .z import q\nimport os") == {"x", "y", "z"}


def test_every_stage_waits_only_for_what_exists():
    plan = stages.plan()
    assert all(need in plan for needs in plan.values() for need in needs)
    done = []
    while len(done) < len(plan):
        ready = [n for n in plan if n not in done and all(m in done for m in plan[n])]
        assert ready, "the stages wait for each other in a circle"
        done += ready


def test_the_wheel_carries_settings_and_data_and_imports_fast_things_only(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "settings.ini", "data_manifest.yaml", "LICENSE"):
        shutil.copy(TOP / name, source / name)
    (source / "README.md").write_text("# readme\n")
    shutil.copytree(TOP / "dermgan", source / "dermgan", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from hatchling.build import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel = zipfile.ZipFile(next(source.glob("*.whl")))
    carried = {n.removeprefix("dermgan/") for n in wheel.namelist() if n.startswith("dermgan/")}
    assert {"settings.ini", "data_manifest.yaml", "splits.csv", "published_results.yaml", "core.py"} <= carried
    wheel.extractall(tmp_path / "site")  # our own wheel, made a line above
    probe = ("import sys, dermgan; import dermgan.core as c; assert 'torch' not in sys.modules and 'pandas' not in sys.modules; "
             "assert c.read_profile('quick').image_px; c.published(); assert c.profile_names(); print(dermgan.__version__)")
    ran = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(tmp_path / "site")})
    assert ran.returncode == 0 and ran.stdout.strip() == "0.1.0", ran.stderr


def test_promoting_a_run_that_started_from_published_weights_keeps_them(toy):
    from dataclasses import replace
    import torch
    from dermgan.core import load_weights, save_weights
    folder = toy / "figures" / "smoke"
    folder.mkdir(parents=True)
    save_weights(folder / "generator.safetensors", {"w": torch.arange(4.0)}, {})
    run = replace(command.resolve_run("smoke", 7, root=toy / "runs"), published=folder)
    run.path("tables", "table_gan.csv").write_text("metric,value\n")
    save_weights(run.path("ckpt", "encoder.safetensors"), {"e": torch.ones(2)}, {})
    trained = {"commit": "c0ffee", "environment": {"cores": 2}, "stages": [{"notebook": "05_gan", "seconds": 9}]}
    (folder / "PROVENANCE.json").write_text(json.dumps(trained | {"files": {}}))
    for _ in range(2):
        publish.promote(run, toy)
        said = json.loads((folder / "PROVENANCE.json").read_text())
        assert said["weights_from"] == trained and said["started_from_published_weights"]
    names = sorted(p.name for p in folder.iterdir() if not p.name.endswith(".sha256"))
    assert names == ["MODEL_CARD.md", "PROVENANCE.json", "encoder.safetensors", "generator.safetensors", "table_gan.csv"]
    assert load_weights(folder / "generator.safetensors")[0]["w"].tolist() == [0, 1, 2, 3]
    assert [p.name for p in folder.parent.iterdir()] == ["smoke"]
