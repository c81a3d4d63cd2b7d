"What every benchmark shares: samples in turns, the hardware line, and one JSON line that is printed and kept."
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

RESULTS = Path(os.environ.get("DERMGAN_BENCHMARK_RESULTS") or Path(__file__).resolve().parent / "results")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def hardware(device: str = "cpu") -> str:
    "The processor, its cores, and the threads that this process uses; or the card."
    import torch
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def samples(work, repeats: int = 5, clock=time.perf_counter) -> list[float]:
    "The time of each of several runs. `time.process_time` as the clock counts CPU seconds of all threads."
    times = []
    for _ in range(repeats):
        begin = clock()
        work()
        times.append(clock() - begin)
    return times


def seconds(work, repeats: int = 5, clock=time.perf_counter) -> float:
    "The median time of a piece of work."
    return statistics.median(samples(work, repeats, clock))


def turns(works: dict, repeats: int = 5, clock=time.process_time, scale: float = 1.0) -> dict[str, list[float]]:
    "Name -> times of works that take turns, after one turn that warms up: a busy machine is busy for all of them."
    times = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(repeats):
        for name, work in works.items():
            times[name] += [scale * t for t in samples(work, 1, clock)]
    return times


def report(name: str, value: float | list[float], unit: str, bound: float | None = None, better: str = "lower",
           device: str = "cpu", **more) -> dict:
    "Print one JSON line and keep it in results/<name>.json. Of a list: its median, smallest and largest value."
    line = {"name": name, "value": value, "unit": unit, "bound": bound, "better": better}
    if isinstance(value, list):
        line |= {"value": statistics.median(value), "low": float(f"{min(value):.6g}"), "high": float(f"{max(value):.6g}"), "repeats": len(value)}
    line |= {"value": float(f"{line['value']:.6g}"), "hardware": hardware(device), "date": datetime.date.today().isoformat()} | more
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(line, indent=1) + "\n")
    print(json.dumps(line))
    return line


def versus(name: str, ours: list[float], theirs: list[float], peer: str, each: str, bound: float | None = None,
           digits: int = 4, **more) -> dict:
    "Report our time as a share of a peer's, turn by turn; `each` is the unit of both."
    middle = lambda values: float(f"{statistics.median(values):.{digits}g}")
    return report(name, [a / b for a, b in zip(ours, theirs)], f"of {peer}'s time", bound, peer=peer, ours_value=middle(ours),
                  peer_value=middle(theirs), each=each, **more)


def peers(kind: str, folders: list[str]) -> Path | None:
    "The checkout of a kind among the folders: nvlabs (stylegan2-ada-pytorch) or rosinality (stylegan2-pytorch)."
    sign = {"nvlabs": "training/networks.py", "rosinality": "closed_form_factorization.py"}[kind]
    return next((Path(folder).resolve() for folder in folders if (Path(folder) / sign).is_file()), None)
