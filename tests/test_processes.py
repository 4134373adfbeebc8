"""Nobody is left behind by a program that is killed."""

from __future__ import annotations

import subprocess
import sys

import pytest

SUITE = """
import time
from mixofshow.evaluation.tasks import process_pool

def job(number):
    print("ready", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    with process_pool(1 + 1) as each:
        list(each(job, [1, 2]))
"""
DECODER = """
import time
from pathlib import Path
from mixofshow.tuning.check import ChildReader
from mixofshow.tuning.dataset import Beside

if __name__ == "__main__":
    with ChildReader() as child:
        child.read(Path("missing.png"), Beside(""))
        print("ready", flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize("script", [SUITE, DECODER], ids=["suite", "decoder"])
def test_children_end_when_their_parent_is_killed(script, tmp_path):
    (tmp_path / "parent.py").write_text(script)
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"ready\n"
        parent.kill()
        parent.communicate(timeout=60)  # ends when nobody is left who could write
