"""The rules that keep the project simple: read from the notebooks and the syntax trees of what they export."""
import ast
import io
import json
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
MODULES = sorted(p for p in (TOP / "dermgan").glob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
NOTEBOOKS = sorted((TOP / "nbs").glob("*.ipynb"))
NUMBERED = [p for p in NOTEBOOKS if p.name[0].isdigit()]
ORDER = ("settings core store fetch data lesion phantom attributes metrics parallel winograd convolution layers formats stylegan2 warp ada transfer samples losses gan cost plan factorize invert trunk encode hypernet hypertrain hyperstyle compare directions review frames panel explore "
         "allot augment controls classify grid labels audit selection evidence beyond results lrp references crp browse pcx plant distractors report publish stages reproduce").split()
BASES = {"Module", "Dataset", "Exception", "NamedTuple", "DermganError", "Function", "Unpickler", "Sampler"}
NETWORK = {"urllib", "requests", "http", "socket", "ftplib", "httpx", "aiohttp"}
DRAWS = {"rand", "randn", "randint", "random", "choice", "shuffle", "permutation", "normal", "uniform", "sample"}


def named(paths):
    return [pytest.param(p, id=p.stem) for p in paths]


def cells(path, kind="code"):
    book = json.loads(path.read_text())
    return [c | {"source": "".join(c["source"])} for c in book["cells"] if kind in (c["cell_type"], None)]


def exported(cell):
    return cell["source"].lstrip().startswith("#| export")


def code_of(cell):
    "A code cell as Python: magics and shell lines are not allowed, so it parses."
    return ast.parse(cell["source"])


def is_imports(cell):
    body = [n for n in code_of(cell).body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)
                                                  and getattr(n.value.func, "id", "") in ("plain_style", "import_torchvision"))]
    return bool(body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)


def public_functions(tree):
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node
        if isinstance(node, ast.ClassDef):
            yield from (n for n in node.body if isinstance(n, ast.FunctionDef)
                        and (n.name == "__init__" or not n.name.startswith("_")))


@pytest.mark.parametrize("path", named(MODULES))
def test_modules_functions_and_lines_are_short(path):
    lines = path.read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 400
    start = next(i for i, line in enumerate(lines) if line.startswith("# %% ../nbs"))
    assert [(i + 1, len(line)) for i, line in enumerate(lines) if len(line) > 110 and i >= start] == []
    sizes = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(ast.parse(path.read_text()))
             if isinstance(n, ast.FunctionDef)}
    assert {name: size for name, size in sizes.items() if size > 40} == {}


@pytest.mark.parametrize("path", named(MODULES))
def test_public_names_are_documented(path):
    text, missing = path.read_text(), []
    tree, lines = ast.parse(text), text.splitlines()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
            missing.append(f"{node.name}: docstring")
    for node in public_functions(tree):
        doc = ast.get_docstring(node)
        if node.name not in ("__init__", "forward", "__len__", "__getitem__", "find_class") and (not doc or "\n" in doc):
            missing.append(f"{node.name}: one-line docstring")
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        args = [a for a in args if a is not None and a.arg not in ("self", "cls", "ctx")]
        for a in args:
            if a.annotation is None:
                missing.append(f"{node.name}({a.arg}): type")
            if "#" not in lines[a.lineno - 1]:
                missing.append(f"{node.name}({a.arg}): comment")
        if len({a.lineno for a in args}) != len(args):
            missing.append(f"{node.name}: one parameter a line")
        returns = node.returns
        if returns is not None and not (isinstance(returns, ast.Constant) and returns.value is None):
            if "#" not in lines[returns.end_lineno - 1]:
                missing.append(f"{node.name}: comment on what is returned")
    assert missing == []


@pytest.mark.parametrize("path", named(MODULES))
def test_no_state_no_inheritance_no_stars_no_stray_network(path):
    tree, found = ast.parse(path.read_text()), []
    constants = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found += [f"{node.name} inherits {ast.unparse(b)}" for b in node.bases if ast.unparse(b).split(".")[-1] not in BASES]
        if isinstance(node, ast.Global):
            found.append(f"line {node.lineno}: global")
        if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
            found.append(f"line {node.lineno}: star import")
        if isinstance(node, (ast.Import, ast.ImportFrom)) and path.stem != "fetch":
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"line {node.lineno}: {n}" for n in names if n.split(".")[0] in NETWORK]
        if isinstance(node, ast.FunctionDef):
            stored = [n for n in ast.walk(node) if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store)]
            found += [f"line {n.lineno}: changes {n.value.id}" for n in stored
                      if isinstance(n.value, ast.Name) and n.value.id in constants]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in DRAWS:
            owner = ast.unparse(node.func.value)
            if owner in ("random", "np.random", "numpy.random"):
                found.append(f"line {node.lineno}: {owner}.{node.func.attr} draws from a global generator")
    assert found == []


@pytest.mark.parametrize("path", named(MODULES))
def test_a_module_imports_only_what_comes_before(path):
    assert path.stem in ORDER, "give the module its place in ORDER"
    later = set(ORDER[ORDER.index(path.stem):])
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("dermgan")):
            module = (node.module or "").removeprefix("dermgan").lstrip(".").split(".")[0]
            found += [m for m in ([module] if module else [a.name for a in node.names]) if m in later]
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("dermgan.") and a.name.split(".")[1] in later]
    assert found == []


@pytest.mark.parametrize("path", named(MODULES))
def test_comments_promise_nothing(path):
    comments = [t.string for t in tokenize.generate_tokens(io.StringIO(path.read_text()).readline) if t.type == tokenize.COMMENT]
    assert [c for c in comments if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", c)] == []


@pytest.mark.parametrize("path", named(NUMBERED))
def test_a_notebook_keeps_the_order_of_cells(path):
    every = cells(path, None)
    first = every[0]["source"].splitlines()
    assert first[0].startswith("# ") and len([line for line in first[1:] if line.strip()]) == 1, "title and a promise"
    rows = [line for line in every[1]["source"].splitlines() if line.startswith("| **")]
    assert [re.match(r"\| \*\*(\w+)\*\*", row)[1] for row in rows] == ["reads", "makes", "takes"]
    assert every[2]["source"].startswith("#| default_exp ")
    tagged = [c for c in every if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and tagged[0]["source"] == 'profile = "quick"\nseed = 0' and not exported(tagged[0])
    heads = [m[1] for c in cells(path, "markdown") if (m := re.match(r"## (.+)", c["source"]))]
    assert heads[-4:] == ["Run", "Figure", "Against the paper", "Limits"]
    limits = next(c for c in reversed(every) if c["source"].startswith("## Limits"))["source"].split("\n", 1)[1]
    assert 3 <= len(re.findall(r"[.!?](?=\s|$)", limits)) <= 6
    assert not any("eval: false" in c["source"] for c in every)


@pytest.mark.parametrize("path", named(NUMBERED))
def test_exported_cells_are_short_and_proved(path):
    code = cells(path)
    defining = [c for c in code if exported(c) and not is_imports(c)]
    long = [c["source"].splitlines()[1] for c in defining if len(c["source"].splitlines()) > 41
            and sum(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in code_of(c).body) == 1]
    assert long == []
    proving = [c for c in code if not exported(c) and any(isinstance(n, ast.Assert) for n in ast.walk(code_of(c)))]
    assert 2 * len(proving) >= len(defining), f"{len(proving)} asserting cells for {len(defining)} exported"


@pytest.mark.parametrize("path", named(NOTEBOOKS))
def test_every_lesson_ends_in_something_displayed(path):
    silent = []
    for c in cells(path):
        if exported(c) or c["source"].startswith("#| default_exp") or "parameters" in c["metadata"].get("tags", []) or is_imports(c):
            continue
        last = code_of(c).body[-1]
        if not isinstance(last, ast.Expr) or c["source"].rstrip().endswith(";"):
            silent.append(c["source"].splitlines()[-1])
    assert silent == []


@pytest.mark.parametrize("path", named(NOTEBOOKS))
def test_a_notebook_is_small_clean_and_told_in_words(path):
    text, book = path.read_text(), json.loads(path.read_text())
    assert len(text.encode()) <= 300 * 1024
    assert "widgets" not in book["metadata"] and "papermill" not in book["metadata"]
    for c in book["cells"]:
        assert set(c["metadata"]) <= {"tags"} and c.get("execution_count") is None
        for output in c.get("outputs", []):
            assert output["output_type"] != "error"
            for kind in ("image/png", "image/jpeg"):
                if kind in output.get("data", {}):
                    assert len(output.get("metadata", {}).get(kind, {}).get("alt", "")) >= 40, "alt text"


def test_nothing_tracked_names_a_machine_or_a_package_index():
    names = subprocess.run(["git", "ls-files", "-z"], cwd=TOP, capture_output=True, text=True)
    files = [TOP / n for n in names.stdout.split("\0") if n] if names.returncode == 0 else [*MODULES, *NOTEBOOKS]
    banned = re.compile("|".join(["/work" + "/", "/ho" + "me/", "/ro" + "ot/", "pypi" + r"\.org", "pythonhosted" + r"\.org",
                                  "npmjs" + r"\.org", "debian" + r"\.org"]))
    found = [f"{f.name}: {m[0]}" for f in files if f.suffix in (".py", ".ipynb", ".md", ".sh", ".ini", ".yaml", ".toml", ".txt",
             ".json", ".csv", ".cff") and f.is_file() for m in [banned.search(f.read_text(errors="replace"))] if m]
    assert found == []


def test_every_notebook_has_its_place_in_the_run():
    from dermgan.stages import NEEDS
    assert [p.stem for p in NOTEBOOKS if p.stem not in NEEDS] == []


def test_nbdev_export_and_clean_leave_no_difference(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy(TOP / name, copy / name)
    shutil.copytree(TOP / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".*"))
    (copy / "dermgan").mkdir()
    shutil.copy(TOP / "dermgan" / "__init__.py", copy / "dermgan")
    command = "from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()"
    done = subprocess.run([sys.executable, "-c", command], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    changed = [p.name for p in MODULES if not (copy / "dermgan" / p.name).exists()
               or (copy / "dermgan" / p.name).read_bytes() != p.read_bytes()]
    changed += [p.name for p in NOTEBOOKS if (copy / "nbs" / p.name).read_bytes() != p.read_bytes()]
    assert changed == []


def test_readme_is_the_index():
    from dermgan.publish import readme_text
    text, files = readme_text(TOP / "nbs" / "index.ipynb")
    assert (TOP / "README.md").read_text() == text, "run: dermgan readme"
    folder = TOP / "figures" / "readme"
    there = folder.iterdir() if folder.is_dir() else []
    assert {p.name: p.read_bytes() for p in there} == files


@pytest.mark.parametrize("kind", ["figure", "table"])
def test_a_figure_or_table_is_made_by_one_notebook_only(kind):
    made = [(name, path.stem) for path in NOTEBOOKS for cell in cells(path)
            for name in re.findall(rf'\b{kind}\(run, "(\w+)"', cell["source"])]
    makers = {}
    for name, stem in made:
        makers.setdefault(name, []).append(stem)
    assert len(makers) > 20 and {name: stems for name, stems in makers.items() if len(stems) > 1} == {}
