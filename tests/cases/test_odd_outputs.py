"""Odd outputs are refused before any work, temporary files are nobody else's business, and disks that refuse say so.

Covers F17, F18, F19, F21, F25, F26, F34, B32, G3, G6 and what F9, F13 and G4 say of folders on a full disk.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

from mixofshow import outputs
from mixofshow.concepts.model import ConceptModel
from mixofshow.errors import BadInputError, MixOfShowError, ResourceError
from mixofshow.outputs import check_outputs, scratch, write_text, writing, writing_folder

LONG = "x" * 250


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with something of every kind, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "nowhere").symlink_to("missing")
    (tmp_path / "linked").symlink_to("folder")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (".", "files", "cannot be the name of a new regular file"),
        ("folder/..", "folders", "cannot be the name of a new folder"),
        ("..", "folders", "cannot be the name of a new folder"),
        ("/", "folders", "cannot be the name of a new folder"),
        ("pipe", "files", "exists and is not a regular file"),
        ("link", "files", "exists and is not a regular file"),
        ("nowhere", "files", "exists and is not a regular file"),
        ("folder", "files", "exists and is not a regular file"),
        ("/dev/null", "files", "exists and is not a regular file"),
        ("file", "folders", "exists and is not a folder"),
        ("linked", "folders", "exists and is not a folder"),
        ("/proc", "folders", "a disk is mounted there"),
        ("file", "shared", "exists and is not a folder"),
        ("file/new", "files", "cannot be written (Not a directory)"),
        ("f\udce7", "folders", "its name is not in this system's encoding"),
        (f"{LONG}.safetensors", "files", "cannot be written (File name too long)"),
        (f"new/{LONG}yyyyyy/a.png", "files", "cannot be written (File name too long)"),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(there, name, kind, message):
    before = sorted(there.rglob("*"))
    with pytest.raises(BadInputError) as raised:
        check_outputs(**{kind: {"PNG": [Path(name)]} if kind == "files" else [Path(name)]})
    assert message in str(raised.value) and len(str(raised.value)) < 300
    assert sorted(there.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("a.JPG", "PNG", "a.JPG: PNG is written there, though it is called .JPG"),
        ("a.png", "safetensors", "a.png: safetensors is written there, though it is called .png"),
        ("a.safetensors", "PNG", "though it is called .safetensors"),
        ("a.ckpt", "safetensors", "though it is called .ckpt"),
        *((name, "PNG", None) for name in ("a.PNG", "a", "a.v1")),
        ("a.htm", "HTML", None),
        ("tune.yaml", "settings", None),
    ],
)
def test_a_name_of_another_kind_is_said(there, name, kind, said, caplog):
    """`sample --out dog.jpg` wrote a PNG of that name without a word."""
    check_outputs(files={kind: [Path(name)]})
    assert said in caplog.text if said else not caplog.records


def test_looking_leaves_nothing_behind(there):
    files = {"PNG": [there / "new" / "deep" / "a.png"]}
    check_outputs(files=files, folders=[there / "new" / "f"], shared=[Path("linked"), Path()])
    assert not (there / "new").exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EIO])
def test_permissions_and_full_disks_are_the_machines_fault(there, monkeypatch, code):
    def refuse(**_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ResourceError, match=f"a.png: cannot be written \\({os.strerror(code)}\\)") as raised:
        check_outputs(files={"PNG": [there / "a.png"]})
    assert raised.value.exit_code == 3


@pytest.mark.parametrize("name", ["con", "NUL.txt", "a:b", "what?", "dot.", "blank ", "com1.safetensors"])
def test_names_that_windows_has_for_devices_or_refuses(name):
    assert outputs.RESERVED.fullmatch(name) and not outputs.RESERVED.fullmatch(
        f"x{name}x".replace(":", "").replace("?", "")
    )


def test_the_longest_name_can_be_written(tmp_path):
    longest = "x" * os.pathconf(tmp_path, "PC_NAME_MAX")
    write_text(tmp_path / longest, "1")
    with writing_folder(tmp_path / f"{longest[1:]}y") as folder:
        (folder / longest).touch()
    assert len(list(tmp_path.iterdir())) == 2


def test_nobody_can_know_where_a_file_is_made(tmp_path):
    """In a folder that others write to, a link at a place that can be guessed would be followed."""
    names = []
    for _ in range(2):
        with writing(tmp_path / "a.txt") as file:
            file.write_text("1")
            (staging,) = tmp_path.glob(".*")
            names.append(staging.name)
            assert stat.S_IMODE(staging.stat().st_mode) == 0o700
    assert names[0] != names[1] and not list(tmp_path.glob(".*"))


def test_threads_that_write_one_file_do_not_meet(tmp_path):
    texts = [str(number) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=write_text, args=(tmp_path / "a.txt", text)) for text in texts]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert (tmp_path / "a.txt").read_text() in texts and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_files_have_the_mode_that_the_umask_gives(golden_pipeline, tmp_path, umask):
    before = os.umask(umask)
    try:
        ConceptModel(golden_pipeline).save(tmp_path / "f")
        write_text(tmp_path / "a.txt", "1")
        with writing_folder(tmp_path / "g") as folder:
            (folder / "in").mkdir()
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_leftovers_are_swept_only_when_nobody_works_there(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    with scratch() as used:
        (used / "recording").touch()
        left = tmp_path / "0".join(outputs.STAGING)
        (left / "deep").mkdir(parents=True)
        with scratch():
            assert (used / "recording").exists() and not left.exists()
    assert not list(tmp_path.iterdir())


def test_without_locks_only_what_is_old_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "fcntl", None)
    fresh, old = (tmp_path / one.join(outputs.STAGING) for one in "01")
    fresh.mkdir()
    old.mkdir()
    os.utime(old, (1, 1))
    write_text(tmp_path / "a.txt", "1")
    assert fresh.exists() and not old.exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # as of tokenizers
    ],
    ids=["Python's", "safetensors'", "tokenizers'"],
)
def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path, error):
    with writing_folder(tmp_path / "f") as folder:
        (folder / "a").write_text("1")
    with (
        pytest.raises(ResourceError, match="No space left on device.*nothing was changed"),
        writing_folder(tmp_path / "f") as folder,
    ):
        (folder / "a").write_text("2")
        raise error
    assert (tmp_path / "f" / "a").read_text() == "1" and [one.name for one in tmp_path.iterdir()] == ["f"]


def test_an_error_that_is_not_the_disks_is_not_made_one(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "a"):
        raise ZeroDivisionError
    with pytest.raises(MixOfShowError, match="^ours$"), writing(tmp_path / "a"):
        raise MixOfShowError("ours")
    assert not list(tmp_path.iterdir())
