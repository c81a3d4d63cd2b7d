"""The benchmarks' own arithmetic: medians and spread, turns, the counted floor, the table; nothing is timed."""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

TOP = Path(__file__).resolve().parent.parent
PLACE = TOP / "benchmarks"


@pytest.fixture
def bench(monkeypatch, tmp_path):
    "Import a script of benchmarks/, with results in a folder of the test."
    before = set(sys.modules)
    monkeypatch.setenv("DERMGAN_BENCHMARK_RESULTS", str(tmp_path / "results"))
    monkeypatch.syspath_prepend(str(PLACE))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == PLACE:
            del sys.modules[name]


def script(name: str, *options: str, results: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"DERMGAN_BENCHMARK_RESULTS": str(results), "PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(PLACE / f"{name}.py"), *options], cwd=TOP, env=env, text=True, capture_output=True)


def test_a_result_holds_median_spread_hardware_and_day(bench, tmp_path):
    common = bench("common")
    line = common.report("a", [3.0, 1.0, 2.5e-7, 9.0, 2.0], "s", 4, "higher", n=7)
    assert {k: line[k] for k in ("value", "low", "high", "repeats", "bound", "better", "n")} == \
        {"value": 2.0, "low": 2.5e-7, "high": 9.0, "repeats": 5, "bound": 4, "better": "higher", "n": 7}
    assert json.loads((tmp_path / "results" / "a.json").read_text()) == line
    assert "cores" in line["hardware"] and len(line["date"].split("-")) == 3
    assert common.report("b", 1.23456789e-8, "relative")["value"] == 1.23457e-8 and "low" not in common.report("b", 1.0, "s")


def test_a_ratio_is_taken_turn_by_turn(bench):
    line = bench("common").versus("r", [1.0, 10.0, 3.0], [2.0, 40.0, 4.0], "theirs", "ms", 0.5)
    assert (line["value"], line["low"], line["high"]) == (0.5, 0.25, 0.75), "not the ratio of the medians, 0.75"
    assert (line["ours_value"], line["peer_value"], line["unit"]) == (3.0, 4.0, "of theirs's time")


def test_works_take_turns_after_one_that_warms_up(bench):
    calls, now = [], iter(range(100))
    took = bench("common").turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, lambda: next(now), 10)
    assert "".join(calls) == "ab" * 4 and took == {"a": [10, 10, 10], "b": [10, 10, 10]}


def test_the_floor_counts_what_a_convolution_does(bench):
    floor = bench("floor")
    x, w = torch.empty(2, 6, 10, 10, device="meta", requires_grad=True), torch.empty(8, 6, 3, 3, device="meta", requires_grad=True)
    forward, moved, _ = floor.count(lambda: F.conv2d(x, w, padding=1))
    assert forward == pytest.approx(2 * 2 * 8 * 100 * 54 / 1e9) and moved == pytest.approx((1200 + 432 + 1600) / 1e9)
    both, _, every = floor.count(lambda: F.conv2d(x, w, padding=1).mul(2).sum().backward())
    assert both == pytest.approx(3 * forward) and every > 3 * moved, "a gradient by input and one by weight cost a convolution each"
    assert floor.step(16, 256, 4)["gflop"] > 0


def test_the_parts_of_a_step_are_weighted_by_how_often_they_run(bench):
    step = bench("gan_step")
    assert [step.share(due) for due in (step.always, step.each(4), step.each(16), step.others(16))] == [1, 1 / 4, 1 / 16, 15 / 16]
    calls = []
    step.in_turn({"main": (lambda: calls.append("m"), step.always), "r1": (lambda: calls.append("r"), step.each(16))})()
    assert "".join(calls) == "mr" + 15 * "m"
    o = step.words().parse_args(["--device", "cuda", "--px", "512", "--base", "32768", "--batch", "4", "--peer", "x", "--peer", "y"])
    assert (o.device, o.px, o.base, o.batch, o.peer) == ("cuda", 512, 32768, 4, ["x", "y"])


@pytest.mark.parametrize("whole", [False, True])
def test_the_step_benchmark_runs_at_another_size(whole, tmp_path):
    done = script("gan_step", "--px", "8", "--base", "64", "--batch", "4", "--repeats", "2", "--precision", "fp32", *["--whole"] * whole,
                  results=tmp_path)
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "gan_step_8_64_fp32.json").read_text())
    assert line["value"] > 0 and line["repeats"] == 2 and line["batch"] == 4 and ("parts" in line) != whole
    if not whole:
        share = {"generator": 3 / 4, "generator and path length": 1 / 4, "discriminator": 15 / 16, "discriminator and R1": 1 / 16, "average": 1}
        assert sum(share[k] * v for k, v in line["parts"].items()) == pytest.approx(line["value"], rel=0.05)


def test_wrong_words_are_said_and_stop(tmp_path):
    done = script("run", "gan_stepp", results=tmp_path)
    assert done.returncode == 2 and "gan_stepp" in done.stderr and "gan_step" in done.stderr
    (tmp_path / "folder").mkdir()
    done = script("gan_step", "--px", "8", "--base", "64", "--peer", str(tmp_path / "folder"), "--precision", "fp32", results=tmp_path)
    assert done.returncode and "folder is a checkout of neither" in done.stderr
    if not torch.cuda.is_available():
        done = script("gan_step", "--device", "cuda", results=tmp_path)
        assert done.returncode and "No CUDA card" in done.stderr and len(done.stderr.strip().splitlines()) == 3


def test_one_command_runs_skips_and_tells_failures(bench, tmp_path, monkeypatch, capsys):
    run = bench("run")
    places = {"good": 'from common import report\nreport("good", [1.0, 2.0, 4.0], "s", 3)\n', "bad": 'raise SystemExit("it broke")\n'}
    (tmp_path / "benchmarks").mkdir()
    for name, text in places.items():
        (tmp_path / "benchmarks" / f"{name}.py").write_text(text)
    (tmp_path / "benchmarks" / "common.py").write_text((PLACE / "common.py").read_text())
    monkeypatch.setattr(run, "TOP", tmp_path)
    monkeypatch.setattr(run, "ALL", {"good": run.Benchmark("good"), "bad": run.Benchmark("bad"), "later": run.Benchmark("good", needs="ham")})
    monkeypatch.setattr(sys, "argv", ["run.py", "--json"])
    assert run.main() == 1, "a benchmark that fails makes the command fail"
    out = capsys.readouterr()
    found = {one["name"]: one for one in json.loads(out.out)}
    assert found["good"]["results"][0]["value"] == 2 and found["later"]["skipped"] == "no finished run of ham"
    assert found["bad"]["failed"] == ["it broke"] and "bad: it broke" in out.err
    table = (tmp_path / "results" / "table.md").read_text()
    assert "| good | 2 | 1 to 4 | ≤ 3 | s |" in table and "≤: lower is better" in table


def test_every_named_benchmark_has_its_script_and_takes_its_options(bench):
    run = bench("run")
    for name, b in run.ALL.items():
        text = (PLACE / f"{b.script}.py").read_text()
        flags = {w for w in (b.options + " " + b.quick).split() if w.startswith("--")} | ({"--peer"} if b.peers else set())
        assert all(f'"{flag}"' in text for flag in flags), name
    left = {p.stem for p in PLACE.glob("*.py")} - {b.script for b in run.ALL.values()}
    assert left == {"common", "run", "floor", "growth", "ada"}   # shared code; counts; studies of hours
