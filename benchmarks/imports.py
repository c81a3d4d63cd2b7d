"Seconds that `import dermgan` takes, in a fresh process, less the start of Python itself."
import subprocess
import sys

from common import RESULTS, report, seconds

TOP = RESULTS.parents[1]


def start(code: str) -> float:
    return seconds(lambda: subprocess.run([sys.executable, "-c", code], cwd=TOP, check=True), 7)


report("import_dermgan", start("import dermgan.core") - start("pass"), "s", 0.3, what="import dermgan.core, without torch")
