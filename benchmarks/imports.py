"Processor seconds that `import dermgan.core` takes in a fresh process, less the start of Python itself."
import os
import statistics
import subprocess
import sys
from pathlib import Path

from common import report, samples

TOP = Path(__file__).resolve().parents[1]


def start(code: str) -> list[float]:
    "Processor time of a process that runs this code, nine times."
    work = lambda: subprocess.run([sys.executable, "-c", code], cwd=TOP, check=True)
    return samples(work, 9, clock=lambda: sum(os.times()[2:4]))


bare = statistics.median(start("pass"))
report("import_dermgan", [s - bare for s in start("import dermgan.core")], "s of processor time", 0.3)
