"""Every test runs offline and knows where the repository is."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
OFFLINE = TOP / "tests" / "offline"

# The environment of a developer's own run must not steer the tests; real data is asked for by name.
for name in ("DERMGAN_RUN", "DERMGAN_PROGRESS", "DERMGAN_MADE"):
    os.environ.pop(name, None)
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["PYTHONPATH"] = os.pathsep.join([str(OFFLINE), str(TOP), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)

guard = importlib.util.spec_from_file_location("offline_guard", OFFLINE / "sitecustomize.py")
guard.loader.exec_module(importlib.util.module_from_spec(guard))


LONGEST = ("test_smoke", "test_own", "test_parallel", "test_plan", "test_classify", "test_reproduce")


def pytest_collection_modifyitems(items):
    "Files that take longest come first, so that two workers end together."
    rank = {name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def top() -> Path:
    "The repository."
    return TOP


@pytest.fixture(scope="session")
def reproduce():
    "The real command, without data and weights: call it with options, get a finished process."
    env = {k: v for k, v in os.environ.items() if k not in ("DERMGAN_DATA", "DERMGAN_WEIGHTS")}

    def call(*words, top=TOP, timeout=1200, **more):
        paths = os.pathsep.join([str(OFFLINE), str(top)])
        return subprocess.run([sys.executable, "-m", "dermgan.reproduce", *words], cwd=top, text=True, timeout=timeout,
                              capture_output=True, env=env | {"PYTHONPATH": paths} | more)
    return call
