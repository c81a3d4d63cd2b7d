"Processor seconds that `import dermgan.core` takes in a fresh process, less the start of Python itself."
import os
import subprocess
import sys

from common import RESULTS, report, seconds

TOP = RESULTS.parents[1]


def start(code: str) -> float:
    "Processor time of a process that runs this code, median of nine."
    work = lambda: subprocess.run([sys.executable, "-c", code], cwd=TOP, check=True)
    return seconds(work, 9, clock=lambda: sum(os.times()[2:4]))


report("import_dermgan", start("import dermgan.core") - start("pass"), "s of processor time", 0.3)
