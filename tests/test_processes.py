"""Nobody is left behind by a program that is killed."""

from __future__ import annotations

import os
import signal
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
APP = """
import sys
import time
from pathlib import Path
from flwr.supercore.superexec.executor import subprocess_executor
from mixofshow.federation import watched

def run():
    Path(sys.argv[1]).touch()
    time.sleep(600)

watched._run = run  # in the app too, which imports this file
watched.APPS_IMPORT = ()

if __name__ == "__main__":
    watched.fork_apps()
    begun = Path(__file__).with_name("begun")
    subprocess_executor.subprocess.Popen(["flwr-clientapp", str(begun)])
    while not begun.exists():
        time.sleep(0.1)
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("script", [SUITE, DECODER, APP], ids=["suite", "decoder", "app"])
def test_children_end_when_their_parent_is_killed(script, tmp_path):
    (tmp_path / "parent.py").write_text(script)
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"ready\n"
        parent.kill()
        parent.communicate(timeout=60)  # ends when nobody is left who could write


MANY = """
import sys
import time
from threading import Timer
from mixofshow.evaluation.tasks import process_pool

def job(number):
    print("ready", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    Timer(0.3, print, ["sent"], {"flush": True}).start()  # the workers import for longer
    try:
        with process_pool(2) as each:
            list(each(job, range(9)))
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize("seen", [["sent"], ["sent", "ready", "ready"]], ids=["still importing", "at work"])
def test_ctrl_c_ends_workers_and_what_they_were_sent(seen, tmp_path):
    (tmp_path / "parent.py").write_text(MANY)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], start_new_session=True, **pipes) as parent:
        assert [parent.stdout.readline().strip() for _ in seen] == seen
        os.killpg(parent.pid, signal.SIGINT)
        said, errors = parent.communicate(timeout=60)
    assert (parent.returncode, said) == (130, "")
    assert "Traceback" not in errors
