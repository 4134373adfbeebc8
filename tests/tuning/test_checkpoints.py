"""A run that is killed, or runs out of disk, goes on from where it was, and only as the same run."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mixofshow.errors import BadInputError, ResourceError, SettingsError
from mixofshow.files import writing
from mixofshow.tuning import checkpoints
from mixofshow.tuning.checkpoints import Identity, differences, load, newest, save

WHO = Identity({"unet.rank": 4, "steps": 100, "loss.min_snr": None}, {"3.png": "aa"})


def changed(**facts):
    return Identity({**WHO.facts, **facts}, WHO.pictures)


def state(step):
    return {"words": torch.full((100,), float(step))}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Training:
    """A run as small as can be, with all that a real one must not forget."""

    def __init__(self):
        self.layer = nn.Linear(4, 4)
        nn.init.constant_(self.layer.weight, 0.1)
        nn.init.zeros_(self.layer.bias)
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=0.1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / 10)
        self.generator = torch.Generator().manual_seed(0)

    def go(self, steps):
        for _ in range(steps):
            self.layer(torch.randn(2, 4, generator=self.generator)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
        return self.layer.weight.detach()

    def state(self):
        return {
            "layer": self.layer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "words_move": True,
            "losses": [0.5, 0.25],
        }

    def take(self, state):
        for name in ("layer", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])


def test_a_resumed_run_is_bit_equal_to_an_unbroken_one(tmp_path):
    first, second = Training(), Training()
    first.go(4)
    assert save(tmp_path / "new folder", 4, first.state(), WHO) == newest(tmp_path / "new folder")
    step, loaded = load(tmp_path / "new folder", WHO)
    second.take(loaded)
    assert step == 4 and loaded["words_move"] is True and loaded["losses"] == [0.5, 0.25]
    assert str(second.optimizer.state_dict()) == str(first.optimizer.state_dict())
    assert torch.equal(second.go(4), Training().go(8))


def test_the_two_newest_stay(tmp_path):
    for step in (5, 90, 100, 1000):
        save(tmp_path, step, state(step), WHO)
    assert names(tmp_path) == ["step-00000100.pt", "step-00001000.pt"]
    assert load(tmp_path, WHO)[0] == 1000


def test_later_steps_and_the_files_of_others_are_left_alone(tmp_path):
    others = ["step-1.pt", "step-00000001.pt.bak", ".step-00000001.pt.tmp", "step-00000900.pt", ".notes.7.tmp"]
    for name in others:
        (tmp_path / name).write_text("mine")
    for step in (1, 2, 3):
        save(tmp_path, step, state(step), WHO)
    assert names(tmp_path) == sorted([*others, "step-00000002.pt", "step-00000003.pt"])


def test_nothing_is_removed_before_the_new_one_was_read_back(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, state(step), WHO)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def lies(path, data, step):
        assert names(tmp_path)[1:] == ["step-00000001.pt", "step-00000002.pt"]
        path.write_bytes(data[:-1])
        verify(path, data, step)

    verify = checkpoints._verify
    monkeypatch.setattr(checkpoints, "_verify", lies)
    with pytest.raises(ResourceError, match="not read back as it was written.*last good checkpoint: .*00000002.pt$"):
        save(tmp_path, 3, state(3), WHO)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_could_not_be_read_again_is_not_saved(tmp_path):
    save(tmp_path, 1, state(1), WHO)
    with pytest.raises(Exception, match="weights_only"):
        save(tmp_path, 2, {"path": Path("a")}, WHO)
    assert names(tmp_path) == ["step-00000001.pt"]


def test_damaged_checkpoints_are_passed_over(tmp_path, caplog):
    for step in (1, 2):
        save(tmp_path, step, state(step), WHO)
    path, numbers = tmp_path / "step-00000002.pt", random.Random(0)
    whole = path.read_bytes()
    inside = whole.index(state(2)["words"].numpy().tobytes())
    cuts = [whole[: numbers.randrange(len(whole))] for _ in range(50)]
    for data in (b"", b"step", whole + b"x", whole[:inside] + b"\1" + whole[inside + 1 :], *cuts):
        path.write_bytes(data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            step, loaded = load(tmp_path, WHO)
        assert torch.equal(loaded["words"], state(step)["words"])
        if data != whole + b"x":  # what comes after the end does no harm
            assert step == 1 and newest(tmp_path) == tmp_path / "step-00000001.pt"
            assert f"{path}: cannot be read" in caplog.text
        assert path.exists()


def test_no_flipped_bit_is_taken_for_another_number(tmp_path):
    path, numbers = save(tmp_path, 1, state(1), WHO), random.Random(0)
    whole = path.read_bytes()
    for _ in range(200):
        data = bytearray(whole)
        data[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
        path.write_bytes(data)
        if newest(tmp_path):
            assert torch.equal(load(tmp_path, WHO)[1]["words"], state(1)["words"])


@pytest.mark.parametrize("content", [{}, {"step-00000001.pt": b"cut"}, {"other.pt": b""}])
def test_nothing_to_resume(tmp_path, content):
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BadInputError, match="nothing to resume in "):
            load(folder, WHO)
        assert newest(folder) is None


@pytest.mark.parametrize(
    ("now", "lines"),
    [
        (WHO, []),
        (changed(**{"unet.rank": 8}), ["unet.rank: 4 -> 8"]),
        (changed(**{"loss.min_snr": 5.0}), ["loss.min_snr: None -> 5.0"]),
        (changed(**{"new.setting": None}), []),
        (changed(**{"new.setting": "a\nb"}), ["new.setting: None -> a\\nb"]),
        (Identity({"steps": 100}, WHO.pictures), ["unet.rank: 4 -> None"]),
        (changed(steps=200), []),
        (changed(steps=50), ["steps: 100 -> 50"]),
        (changed(steps=None), ["steps: 100 -> None"]),
        (Identity(WHO.facts, {"3.png": "bb", "4.png": "cc"}), ["picture 3.png: changed", "picture 4.png: new"]),
        (Identity(WHO.facts, {}), ["picture 3.png: gone"]),
    ],
)
def test_differences(tmp_path, now, lines):
    allowed = {"may_grow": {"steps"}}
    assert differences(WHO, now, **allowed) == lines
    save(tmp_path, 1, state(1), WHO)
    if not lines:
        assert load(tmp_path, now, **allowed)[0] == 1
        return
    with pytest.raises(SettingsError) as raised:
        load(tmp_path, now, **allowed)
    assert str(raised.value).endswith(f"of another run: {'; '.join(lines)}")


def test_many_differences_are_cut(tmp_path):
    save(tmp_path, 1, state(1), WHO)
    with pytest.raises(SettingsError, match="picture 28.png: new; picture 29.png: new; and 10 more$"):
        load(tmp_path, Identity(WHO.facts, {**WHO.pictures, **{f"{number}.png": "" for number in range(10, 40)}}))


def test_who_a_run_is():
    facts = Identity.of({"steps": 1}, {}, base_fingerprint="ab").facts
    assert facts["steps"] == 1 and facts["base model's fingerprint"] == "ab" and facts["checkpoint format"] == 1
    assert {"version of torch", "version of diffusers", "version of transformers", "version of peft"} < facts.keys()


def test_a_living_run_keeps_its_temporary(tmp_path):
    with writing(tmp_path / "step-00000002.pt") as ours:
        theirs = tmp_path / ".mixofshow-0123456789abcdef.tmp"
        theirs.mkdir()
        ours.touch()
        save(tmp_path, 1, state(1), WHO)
        assert ours.exists() and not theirs.exists()


# Forks, because importing torch anew for every kill would take a minute. A child dies inside the call that is named
# (after doing half of it, where that can be), or is killed from outside after a while.
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from mixofshow.tuning.checkpoints import Identity, load, save

torch.set_num_threads(1)  # a forked process would wait for threads that it did not inherit
folder, who, numbers = Path(sys.argv[1]), Identity({"steps": 1}, {}), random.Random(0)

def state(step):
    return {"words": torch.full((500_000,), float(step))}

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def write_half(self, data):
    with self.open("wb") as file:
        file.write(data[: len(data) // 2])
    die()

POINTS = [(Path, "write_bytes", write_half), (os, "fsync", die), (Path, "replace", die), (Path, "unlink", die)]

def child(step, point):
    if point:
        setattr(*point)
    while True:
        step += 1
        save(folder, step, state(step), who)

last = 0
save(folder, 0, state(0), who)
save(folder, 1, state(1), who)
for point in [*POINTS, *[None] * 8]:
    left = load(folder, who)[0]
    process = os.fork()
    if not process:
        child(left, point)
    if not point:
        time.sleep(numbers.uniform(0.02, 0.15))
        os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL, point
    torn = [path.name for path in folder.glob(".*")]
    step, loaded = load(folder, who)
    assert step >= max(last, left) and torch.equal(loaded["words"], state(step)["words"])
    assert not list(folder.glob(".*")) and len(list(folder.iterdir())) <= 3
    print(point and point[1], left, step, torn)
    last = step
"""


def python(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )


def test_kill_9_leaves_a_checkpoint_that_loads(tmp_path):
    done = python(KILLS, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 12
    assert all(".tmp" in line for line in lines[:3])


FULL = """
import resource, sys
from pathlib import Path
import torch
from mixofshow.errors import MixOfShowError
from mixofshow.tuning.checkpoints import Identity, save

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    for step, size in enumerate(map(int, sys.argv[2:])):
        save(Path(sys.argv[1]), step, {"words": torch.zeros(size)}, Identity({}, {}))
except MixOfShowError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_full_disk_names_the_last_good_checkpoint(tmp_path):
    done = python(FULL, tmp_path, 10, 20, 100_000)
    assert done.returncode == 3, done.stderr
    assert done.stdout == (
        f"{tmp_path}/step-00000002.pt: could not be written (File too large); nothing was changed; "
        f"last good checkpoint: {tmp_path}/step-00000001.pt\n"
    )
    assert names(tmp_path) == ["step-00000000.pt", "step-00000001.pt"]


def test_a_disk_that_was_never_good(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceError, match="No space left on device.*last good checkpoint: none yet$"):
        save(tmp_path, 1, state(1), WHO)
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be written"):
        save(tmp_path / "file" / "folder", 1, state(1), WHO)
