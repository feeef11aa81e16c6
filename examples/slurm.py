"""The paper's experiment on a SLURM cluster: eight jobs with a GPU each share the prompts.

    pip install dask-jobqueue
    python examples/slurm.py

Run it where SLURM jobs can be submitted and can reach this machine. The repository and its ``.venv`` must be on a disk
that all nodes share. Queue, memory and time are those of your cluster.
"""

import os
import subprocess
import sys

from dask_jobqueue import SLURMCluster

if __name__ == "__main__":
    job = {"queue": "gpu", "cores": 1, "processes": 1, "memory": "24GB", "walltime": "24:00:00"}
    with SLURMCluster(**job, job_extra_directives=["--gres=gpu:1"]) as cluster:
        cluster.scale(jobs=8)
        environment = os.environ | {"NEMO_DASK": cluster.scheduler_address}
        sys.exit(subprocess.call(["make", "all", "PROFILE=sd14"], env=environment))
