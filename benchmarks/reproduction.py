"Seconds and peak memory of a finished run, from its logs, and of the command when there is nothing to do."
import json
import os
import subprocess
import sys
from pathlib import Path

from common import report, samples

from dermgan.core import resolve_run

TOP = Path(__file__).resolve().parents[1]
profile = sys.argv[1] if len(sys.argv) > 1 else "quick"
run = resolve_run(profile)
logs = [json.loads(path.read_text()) for path in run.folder.glob("logs/*.json")]
if not logs:
    sys.exit(f"Nothing ran in {run.folder.name}.\nThe benchmark reads its logs.\nRun: ./reproduce.sh --profile {profile}")
minutes = sum(log["seconds"] for log in logs) / 60
report(f"{profile}_minutes", minutes, "minutes of stages", {"smoke": 5, "quick": 15}.get(profile), stages=len(logs))
report(f"{profile}_peak", max(log["peak_mib"] for log in logs) / 1024, "GiB, largest process", 4)
command = [sys.executable, "-m", "dermgan.reproduce", "--profile", profile]
env = os.environ | {"PYTHONPATH": str(TOP)}
idle = samples(lambda: subprocess.run(command, cwd=TOP, check=True, capture_output=True, env=env), 3)
report(f"{profile}_idle", idle, "s with nothing to do", 5)
