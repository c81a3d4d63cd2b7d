# One rule per notebook, and the fan-out of classifier runs. ./reproduce.sh resolves the run and calls this in its folder.
# `key` is a digest of code, so that a fresh clone's dates or committed outputs make nothing run again.
import sys
from pathlib import Path

from dermgan.core import file_sha256, read_run
from dermgan.stages import cells, code_digest, notebook_digest, plan, top

python = sys.executable
run = read_run(Path.cwd())
stages = plan()
grid = cells(run.profile) if "11_classify" in stages else []
review = top() / "figures" / run.profile.name / "directions.yaml"
said = file_sha256(review) if review.is_file() else ""   # a saved decision makes 09_review run again
names = top() / "figures" / run.profile.name / "concepts.yaml"
named = file_sha256(names) if names.is_file() else ""   # a named concept makes the figures run again
own_files = {"09_review": said} | dict.fromkeys(("14_crp", "14_browse", "15_pcx"), named)
cell_file = "ckpt/classify/{0}-{1}-plain-s{2}.json"
# Narrow networks step faster on one thread than on two (benchmarks/gan_threads.py), and leave the other core to other stages.
wide = {"05_gan", "07_invert", "07_encode", "08_hypertrain", "08_hyperstyle", "08_compare"}
whole_machine = wide if run.profile.channel_base >= 2048 else set()
long = {"05_gan", "07_invert", "07_encode", "08_hypertrain", "10_augment"}   # begun first: most of the rest waits for them


def waits_for(stage):
    "The executed notebooks and classifier runs that a stage needs."
    extra = {"11_classify": grid[:1], "12_results": grid}.get(stage, [])
    return [f"nbs/{name}.ipynb" for name in stages[stage]] + [cell_file.format(*cell) for cell in extra]


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
        priority: 2 if stage in long else 0
        shell: "exec {python:q} -m dermgan.reproduce notebook {params.stage} --run ."


rule classify:
    input: lambda w: "nbs/02_phantom.ipynb" if w.set == "baseline" else "nbs/10_augment.ipynb"
    output: "ckpt/classify/{arch}-{set}-plain-s{seed}.json"
    params: key=code_digest("import dermgan.classify", top() / "dermgan")
    wildcard_constraints: set="baseline|[0-9]+k", seed="[0-9]+"
    threads: max(1, workflow.cores // max(1, len(grid)))
    shell: "exec {python:q} -m dermgan.reproduce cell {wildcards.arch} {wildcards.set} {wildcards.seed} --run ."
