"""A Slurm of one machine, as much of it as is asked for: sbatch, srun, sacct and scancel in a folder to put on PATH.

jobs/N/script   what was submitted        jobs/N/pid   its process group
jobs/N/state    how it ended              refuse       if there, sbatch says this and fails
"""

from __future__ import annotations

import random
from pathlib import Path

SBATCH = """#!/bin/bash
home={home}
if [ -e $home/refuse ]; then cat $home/refuse >&2; exit 1; fi
number=$(({first} + $(ls $home/jobs | wc -l)))
mkdir $home/jobs/$number
cp "$1" $home/jobs/$number/script
export SLURM_JOB_ID=$number
setsid bash -c "echo \\$\\$ > $home/jobs/$number/pid; bash $home/jobs/$number/script;
  if [ \\$? = 0 ]; then end=COMPLETED; else end=FAILED; fi
  [ -e $home/jobs/$number/state ] || echo \\$end > $home/jobs/$number/state" >/dev/null 2>&1 </dev/null &
echo "Submitted batch job $number"
"""
SRUN = """#!/bin/bash
while [ "${{1#--}}" != "$1" ]; do
  case $1 in --output) out=$2; shift;; --error) err=$2; shift;; esac
  shift
done
fill() {{ echo "$1" | sed "s/%j/$SLURM_JOB_ID/g; s/%t/0/g"; }}
mkdir -p "$(dirname "$(fill "$out")")"
exec "$@" >"$(fill "$out")" 2>"$(fill "$err")"
"""
SACCT = """#!/bin/bash
echo 'JobID|State|NodeList'
for word in "$@"; do
  if [ -e {home}/jobs/$word/state ]; then echo "$word|$(cat {home}/jobs/$word/state)|here"
  elif [ -e {home}/jobs/$word ]; then echo "$word|RUNNING|here"; fi
done
"""
SCANCEL = """#!/bin/bash
echo "CANCELLED by 0" > {home}/jobs/$1/state
kill -TERM -- -$(cat {home}/jobs/$1/pid)
"""


def make(home: Path) -> Path:
    """The folder for PATH."""
    first = random.randrange(1, 10**9)  # submitit remembers what it heard of a number
    (home / "jobs").mkdir(parents=True)
    (home / "bin").mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT, "scancel": SCANCEL}.items():
        (home / "bin" / name).write_text(text.format(home=home, first=first))
        (home / "bin" / name).chmod(0o755)
    return home / "bin"
