"""Two fresh smoke runs of one seed make the same figures and tables, byte for byte. `pytest -m twice`, some minutes."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_mutations import copy_of_everything

TIMED = {"fig_stages.csv", "fig_stages.png", "table_stages.csv", "table_environment.csv"}


def run_smoke(folder: Path) -> Path:
    "The run's folder in a copy of the repository."
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder / "tests" / "offline"), str(folder)])}
    for name in ("DERMGAN_RUN", "DERMGAN_DATA", "DERMGAN_WEIGHTS"):
        env.pop(name, None)
    words = ["run", "--profile", "smoke", "--set", "precision=fp32", "--until", "index"]
    done = subprocess.run([sys.executable, "-m", "dermgan.reproduce", *words], cwd=folder, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next((folder / "runs").glob("smoke-*"))


def same(a: Path, b: Path) -> bool:
    "Equal pixels; equal bytes, where a table holds no seconds."
    if a.suffix == ".png":
        return np.array_equal(*(np.asarray(Image.open(path).convert("RGB")) for path in (a, b)))
    if a.suffix == ".csv" and "seconds" in a.read_text().partition("\n")[0].split(","):
        return pd.read_csv(a, dtype=str).drop(columns="seconds").equals(pd.read_csv(b, dtype=str).drop(columns="seconds"))
    return a.read_bytes() == b.read_bytes()


@pytest.mark.twice
def test_two_fresh_runs_are_equal(tmp_path):
    first, second = map(run_smoke, [copy_of_everything(tmp_path / name) for name in ("first", "second")])
    made = sorted(p.relative_to(first) for place in ("figures", "tables") for p in (first / place).iterdir()
                  if p.name not in TIMED)
    assert len(made) > 40
    for path in made:
        assert same(first / path, second / path), path
