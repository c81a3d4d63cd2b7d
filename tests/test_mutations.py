"""Does a test notice? One line broken per module; a lesson cell or a test must fail for each."""
import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

TOP = Path(__file__).resolve().parent.parent
MUTATIONS = yaml.safe_load((TOP / "tests" / "mutations.yaml").read_text())
MODULES = {p.stem for p in (TOP / "dermgan").glob("*.py")} - {"__init__", "_modidx"}


def notebook_of(module: str, top: Path = TOP) -> Path:
    "The notebook that exports a module."
    return next(p for p in sorted((top / "nbs").glob("*.ipynb"))
                if any("".join(c["source"]).startswith(f"#| default_exp {module}")
                       and "".join(c["source"]).split()[-1] == module for c in json.loads(p.read_text())["cells"]))


def lessons(path: Path) -> str:
    "A notebook's code up to its run, as a script."
    code = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        if text.startswith("## Run"):
            break
        if cell["cell_type"] == "code":
            code.append(text.replace('profile = "quick"', 'profile = "smoke"'))
    return "\n\n".join(["import matplotlib; matplotlib.use('Agg')", *code])


def copy_of_everything(folder: Path) -> Path:
    for name in ("dermgan", "nbs", "tests", "benchmarks"):
        shutil.copytree(TOP / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"), dirs_exist_ok=True)
    for path in (p for p in TOP.iterdir() if p.is_file() and not p.name.startswith(".")):
        shutil.copy(path, folder / path.name)
    return folder


def apply(folder: Path, mutation: dict) -> None:
    "Break the line in the module and in the cell that it came from."
    line, becomes = mutation["line"], mutation["becomes"]
    module = folder / "dermgan" / f"{mutation['module']}.py"
    module.write_text(module.read_text().replace(line, becomes))
    path = notebook_of(mutation["module"], folder)
    book = json.loads(path.read_text())
    for cell in book["cells"]:
        cell["source"] = "".join(cell["source"]).replace(line, becomes)
    path.write_text(json.dumps(book))


def run_lessons(folder: Path, module: str) -> int:
    "The exit code of a notebook's lessons, imported as a module so that no command line runs."
    (folder / "nbs" / "lessons.py").write_text(lessons(notebook_of(module, folder)))
    return subprocess.run([sys.executable, "-c", "import lessons"], cwd=folder / "nbs", **surroundings(folder)).returncode


def surroundings(folder: Path) -> dict:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder / "tests" / "offline"), str(folder)]),
                        "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    env.pop("DERMGAN_RUN", None)
    return {"env": env, "capture_output": True, "text": True, "timeout": 900}


def test_files(folder: Path, module: str) -> list[str]:
    shared = {"warp": "ada", "convolution": "layers", "samples": "gan", "settings": "core", "lesson": "phantom", "report": "reproduce", "publish": "reproduce", "stages": "reproduce",
              "layers": "stylegan2", "formats": "stylegan2", "allot": "classify", "controls": "augment", "grid": "classify", "labels": "explore", "trunk": "encode", "cost": "plan"}
    names = [f"tests/test_{name}.py" for name in dict.fromkeys([module, shared.get(module, module)])]
    return [name for name in names if (folder / name).exists()]


test_files.__test__ = False


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m["module"])
def test_the_line_to_break_is_there(mutation):
    text = (TOP / "dermgan" / f"{mutation['module']}.py").read_text()
    cells = ["".join(c["source"]) for c in json.loads(notebook_of(mutation["module"]).read_text())["cells"]]
    assert text.count(mutation["line"]) == 1 and sum(c.count(mutation["line"]) for c in cells) == 1
    ast.parse(text.replace(mutation["line"], mutation["becomes"]))


def test_every_module_has_a_line_to_break():
    assert {m["module"] for m in MUTATIONS} == MODULES


def test_a_broken_setting_is_noticed_and_a_whole_one_is_not(tmp_path):
    folder = copy_of_everything(tmp_path)
    script = lessons(notebook_of("settings"))
    assert "assert" in script and "default_exp settings" in script
    mutation = next(m for m in MUTATIONS if m["module"] == "settings")
    assert run_lessons(folder, "settings") == 0
    apply(folder, mutation)
    assert run_lessons(folder, "settings") != 0


@pytest.mark.mutation
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m["module"])
def test_a_broken_line_is_noticed(mutation, tmp_path):
    folder, module = copy_of_everything(tmp_path), mutation["module"]
    whole = run_lessons(folder, module) == 0
    apply(folder, mutation)
    if whole and run_lessons(folder, module):
        return
    files = test_files(folder, module)
    done = files and subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", *files], cwd=folder, **surroundings(folder))
    assert done and done.returncode == 1, f"nobody noticed; the lessons {'passed' if whole else 'need a run'}"
