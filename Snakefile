# One rule per notebook, and the fan-out of classifier runs. ./reproduce.sh resolves the run and calls this in its folder.
# `key` is a digest of code, so that a fresh clone's dates or committed outputs make nothing run again.
import sys
from pathlib import Path

from dermgan.core import file_sha256, read_run
from dermgan.settings import CellKey, cell_name, cell_stage, plan_cells
from dermgan.stages import code_digest, gpus, notebook_digest, plan, top

python = sys.executable
run = read_run(Path.cwd())
stages = plan()
grid = plan_cells(run.profile) if "11_classify" in stages else []
review = top() / "figures" / run.profile.name / "directions.yaml"
said = file_sha256(review) if review.is_file() else ""   # a saved decision makes 09_review run again
names = top() / "figures" / run.profile.name / "concepts.yaml"
named = file_sha256(names) if names.is_file() else ""   # a named concept makes the figures run again
own_files = {"09_review": said} | dict.fromkeys(("14_crp", "14_browse", "15_pcx"), named)
# Narrow networks step faster on one thread than on two (benchmarks/gan_threads.py), and leave the other core to other stages.
wide = {"05_gan", "07_invert", "07_encode", "08_hypertrain", "08_hyperstyle", "08_compare"}
whole_machine = wide if run.profile.channel_base >= 2048 else set()
trained = {"05_gan", "07_encode", "08_hypertrain"}   # by all GPUs together, one process each


def needed_by(stage):
    "Every stage that a stage waits for, at once or later."
    return {name for direct in stages.get(stage, ()) for name in {direct} | needed_by(direct)}


# Of what is ready, first what most of the rest waits for: whatever the GAN needs, then the long stages, then the way from the cells to the report.
urgent = dict.fromkeys(("10_controls", "11_grid", "12_evidence", "12_beyond", "12_results", "14_crp", "15_pcx"), 1)
urgent |= dict.fromkeys(("05_gan", "07_invert", "07_encode", "08_hypertrain", "10_augment"), 2) | dict.fromkeys(needed_by("05_gan"), 3)


def outcome(cell):
    "What a classifier run leaves, finished or failed."
    return f"ckpt/classify/{cell_name(*cell)}.outcome"


def waits_for(stage):
    "The executed notebooks and classifier runs that a stage needs."
    extra = {"11_classify": grid[:1], "11_grid": grid}.get(stage, [])
    return [f"nbs/{name}.ipynb" for name in stages[stage]] + [outcome(cell) for cell in extra]


def cell_waits_for(w):
    "The notebook that makes a cell's images; for a filtered one the unfiltered cell that judges them."
    plain = CellKey(w.arch, w.set, False, w.seed)
    return [f"nbs/{cell_stage(w.set)}.ipynb"] + [outcome(plain)] * (w.filter == "filter")


rule all:
    default_target: True
    input: [f"nbs/{stage}.ipynb" for stage in stages]


for stage in stages:
    rule:
        name: f"nb_{stage}"
        input: waits_for(stage)
        output: f"nbs/{stage}.ipynb"
        params: stage=stage, key=notebook_digest(stage) + own_files.get(stage, "")
        threads: workflow.cores if stage in whole_machine else 1
        priority: urgent.get(stage, 0)
        resources: gpu=gpus() if stage in trained else int(stage in wide)
        shell: "exec {python:q} -m dermgan.reproduce notebook {params.stage} --run ."


rule classify:
    input: cell_waits_for
    output: "ckpt/classify/{arch}-{set}-{filter}-s{seed}.outcome"
    params: key=code_digest("import dermgan.grid", top() / "dermgan")
    wildcard_constraints: arch=r"\w+", set="baseline|([a-z]+-)?[0-9]+k", filter="plain|filter", seed="[0-9]+"
    threads: max(1, workflow.cores // max(1, gpus() or len(grid)))
    priority: 1
    resources: gpu=1
    shell: "exec {python:q} -m dermgan.reproduce cell {wildcards.arch}-{wildcards.set}-{wildcards.filter}-s{wildcards.seed} --run ."
