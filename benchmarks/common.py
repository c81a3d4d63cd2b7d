"What every benchmark shares: the hardware line, and one JSON line that is printed and kept."
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
sys.path.insert(0, str(RESULTS.parents[1]))


def hardware() -> str:
    "The processor, its cores, and the threads that this process uses."
    import torch
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def seconds(work, repeats: int = 5, clock=time.perf_counter) -> float:
    "The median time of a piece of work. `time.process_time` as the clock counts CPU seconds of all threads."
    times = []
    for _ in range(repeats):
        begin = clock()
        work()
        times.append(clock() - begin)
    return statistics.median(times)


def report(name: str, value: float, unit: str, bound: float | None = None, **more) -> dict:
    "Print one JSON line and keep it in results/<name>.json."
    line = {"name": name, "value": round(value, 6), "unit": unit, "bound": bound, "hardware": hardware()} | more
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(line, indent=1) + "\n")
    print(json.dumps(line))
    return line
