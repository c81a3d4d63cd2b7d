"""What the library must not do with outside bytes (R14), read from its syntax trees."""
import ast
from pathlib import Path

import pytest

MODULES = sorted((Path(__file__).resolve().parent.parent / "dermgan").glob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def keyword(call, name):
    return next((k.value for k in call.keywords if k.arg == name), None)


def is_true(node):
    return isinstance(node, ast.Constant) and node.value is True


def offences(code: str, may_unpickle: bool = False) -> list[str]:
    "Everything in a piece of code that R14 bans."
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"imports {n}" for n in names if n.split(".")[0] in UNPICKLERS and not may_unpickle]
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append("bare except")
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle" and node.attr not in ("Unpickler", "UnpicklingError"):
            found.append(f"pickle.{node.attr}")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in ("eval", "exec", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            found.append(name)
        if name == "torch.load" and not is_true(keyword(node, "weights_only")):
            found.append("torch.load without weights_only=True")
        if name.endswith(".load") and keyword(node, "allow_pickle") is not None and not (
                isinstance(keyword(node, "allow_pickle"), ast.Constant) and keyword(node, "allow_pickle").value is False):
            found.append(f"{name} with allow_pickle")
        if name.endswith(".extractall") and keyword(node, "filter") is None:
            found.append(f"{name} without filter")
        if keyword(node, "shell") is not None:
            found.append(f"{name} with shell")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_nothing_outside_is_executed(path):
    assert offences(path.read_text(), may_unpickle=path.stem == "formats") == []


def test_the_one_unpickler_allows_a_list():
    "The class that reads NVlabs files refuses every name that is not on its list."
    classes = [n for p in MODULES if p.stem == "formats" for n in ast.walk(ast.parse(p.read_text()))
               if isinstance(n, ast.ClassDef) and any(ast.unparse(b) == "pickle.Unpickler" for b in n.bases)]
    assert len(classes) <= 1
    for node in classes:
        finder = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "find_class")
        assert any(isinstance(n, ast.Raise) for n in ast.walk(finder))


@pytest.mark.parametrize("code", [
    "import pickle", "from joblib import load", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)",
    "yaml.load(t)", "eval(t)", "exec(t)", "tar.extractall(p)", "run(c, shell=True)", "try:\n    x\nexcept:\n    y"])
def test_the_ban_sees_what_it_bans(code):
    assert offences(code) != []


@pytest.mark.parametrize("code", [
    "torch.load(p, weights_only=True)", "np.load(p)", "np.load(p, allow_pickle=False)", "yaml.safe_load(t)", "model.eval()",
    "tar.extractall(p, filter='data')", "run(c)", "try:\n    x\nexcept OSError:\n    y"])
def test_the_ban_lets_the_rest_pass(code):
    assert offences(code) == []
