"""All benchmarks, or the named ones, one after another and each in a process of its own; then the table of what is known.

    python benchmarks/run.py [NAME]... [--quick] [--peer DIR]... [--json] [--readme] [--list]

    python benchmarks/run.py --peer ../stylegan2-ada-pytorch --peer ../stylegan2-pytorch          everything beside its peers
    python benchmarks/run.py gan_step perception --quick --peer ../stylegan2-ada-pytorch          two, with few repeats
    python benchmarks/run.py gan_gpu_512 --peer ../stylegan2-ada-pytorch                          on a machine with a card

A peer is a checkout, made by you: `git clone https://github.com/NVlabs/stylegan2-ada-pytorch` and
`git clone https://github.com/rosinality/stylegan2-pytorch`. `lpips` is a dependency; `pytorch-fid` is used where it is installed, else its formula.
Ours and theirs take turns in one process, each ratio is one of a turn, and the result holds the median, the smallest and the largest of them.
Results go to benchmarks/results/*.json, and all of them as one table to benchmarks/results/table.md; --json prints them, --readme puts the table
into nbs/index.ipynb and README.md. Benchmarks that need a card or a finished run are skipped where there is none, and said to be.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from common import RESULTS

TOP = Path(__file__).resolve().parents[1]


class Benchmark(NamedTuple):
    "A script, its options, those of --quick, which peers it takes, and what it needs."

    script: str
    options: str = ""
    quick: str = ""
    peers: bool = False
    needs: str = ""  # "card" or a profile whose finished run is read


ALL = {
    "gan_step": Benchmark("gan_step", "--repeats 3", "--repeats 1", True),
    "gan_small": Benchmark("gan_step", "--base 2048 --repeats 9", "--base 2048 --repeats 3", True),
    "gan_threads": Benchmark("gan_threads", "--repeats 20", "--repeats 5"),
    "gan_gpu_512": Benchmark("gan_step", "--device cuda --px 512 --base 32768 --batch 16 --repeats 3", "", True, "card"),
    "gan_gpu_128": Benchmark("gan_step", "--device cuda --px 128 --base 32768 --batch 32 --repeats 5", "", True, "card"),
    "perception": Benchmark("perception", "--repeats 9", "--repeats 5"),
    "lpips_cache": Benchmark("lpips_cache"),
    "frechet": Benchmark("frechet", "--peer --repeats 3", "--peer --repeats 1"),
    "lmdb_read": Benchmark("lmdb_read", "--repeats 7", "--repeats 3", True),
    "factorize": Benchmark("factorize", "--repeats 7", "--repeats 3"),
    "projection": Benchmark("projection", "--repeats 5", "--repeats 2", True),
    "inversion": Benchmark("inversion"),
    "classify": Benchmark("classify", "--repeats 5", "--repeats 2"),
    "lrp": Benchmark("lrp"),
    "attributes": Benchmark("attributes"),
    "phantom_render": Benchmark("phantom_render"),
    "explore": Benchmark("explore"),
    "imports": Benchmark("imports"),
    "reproduction": Benchmark("reproduction", "quick", "quick", False, "quick"),
}


def missing(b: Benchmark) -> str:
    "Why a benchmark cannot run here; empty where it can."
    if b.needs == "card":
        import torch
        return "" if torch.cuda.is_available() else "no CUDA card"
    if b.needs and not list((TOP / "runs").glob(f"{b.needs}-*-s0/logs/*.json")):
        return f"no finished run of {b.needs}"
    return ""


def run(name: str, options) -> dict:
    "Run one benchmark; what it reported, or why it did not."
    b, begin = ALL[name], time.perf_counter()
    if why := missing(b):
        return {"name": name, "skipped": why}
    words = [*((options.quick and b.quick) or b.options).split(), *(w for p in options.peer if b.peers for w in ("--peer", str(Path(p).resolve())))]
    kept = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "1073741824"}   # as ./reproduce.sh sets them
    env = {"OMP_WAIT_POLICY": "PASSIVE"} | kept | os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, str(TOP / "benchmarks" / f"{b.script}.py"), *words], cwd=TOP, env=env, text=True, capture_output=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    failed = {"failed": (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]} if done.returncode else {}
    return {"name": name, "seconds": round(time.perf_counter() - begin, 1), "results": lines} | failed


def put_into_readme(table: str) -> None:
    "Make the table the output of the index notebook's cell that shows it, and write README.md."
    from dermgan.publish import write_readme
    path = TOP / "nbs" / "index.ipynb"
    book = json.loads(path.read_text())
    cell = next(c for c in book["cells"] if "".join(c["source"]).strip() == "benchmark_table()")
    data = {"text/markdown": table.splitlines(keepends=True), "text/plain": ["<IPython.core.display.Markdown object>"]}
    cell["outputs"] = [{"data": data, "execution_count": None, "metadata": {}, "output_type": "execute_result"}]
    path.write_text(json.dumps(book, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    write_readme(TOP)


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ALL))
    words.add_argument("--quick", action="store_true", help="few repeats")
    words.add_argument("--peer", action="append", default=[], metavar="DIR")
    words.add_argument("--json", action="store_true", help="print what was measured as JSON, in place of the table")
    words.add_argument("--readme", action="store_true", help="put the table into README.md")
    words.add_argument("--list", action="store_true", help="name the benchmarks and stop")
    options = words.parse_args()
    if unknown := [name for name in options.names if name not in ALL]:
        words.error(f"unknown: {', '.join(unknown)}. There are {', '.join(ALL)}")
    if options.list:
        print("\n".join(f"{name:16}{b.script}.py {b.options}" for name, b in ALL.items()))
        return 0
    found = []
    for name in options.names or ALL:
        found.append(run(name, options))
        said = found[-1].get("skipped") or " ".join(found[-1].get("failed", [])) or f"{len(found[-1]['results'])} results"
        print(f"{name}: {said}" + (f", {found[-1]['seconds']:.0f} s" if "seconds" in found[-1] else ""), file=sys.stderr, flush=True)
    from dermgan.report import benchmark_table
    table = benchmark_table(RESULTS).data
    (RESULTS / "table.md").write_text(table + "\n")
    print(json.dumps(found, indent=1) if options.json else table)
    if options.readme:
        put_into_readme(table)
    return int(any("failed" in one for one in found))


if __name__ == "__main__":
    sys.exit(main())
