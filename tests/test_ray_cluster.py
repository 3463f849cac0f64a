"""A cluster of the tests' own leaves nothing behind, also where the tests are killed."""

import subprocess
import sys

from tests.ray_cluster import ROOT, pids
from tests.serving import until

STARTS_ONE_AND_HANGS = """
import os, signal, subprocess
from tests.ray_cluster import _killed_at_the_end

with _killed_at_the_end({folder!r}, "BELONGS_TO={folder}"):
    subprocess.Popen(["sleep", "60"], env={{"BELONGS_TO": {folder!r}}}, start_new_session=True)
    print("started", flush=True)
    signal.pause()
"""


def test_a_cluster_does_not_outlive_tests_that_are_killed(tmp_path):
    folder = str(tmp_path / "ray")
    tests = subprocess.Popen(
        [sys.executable, "-c", STARTS_ONE_AND_HANGS.format(folder=folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with tests:
        assert tests.stdout.readline() == "started\n"
        assert len(pids(f"BELONGS_TO={folder}\0")) == 1
        tests.kill()
    until(lambda: pids(f"BELONGS_TO={folder}\0") == [])
