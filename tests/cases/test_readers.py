"""What comes from outside is read once, with limits, and told of in one line that can be printed.

Covers F1, F2, F3, F6, F24, G9 (`~`), F38, F39 (merges, infinite numbers, half characters, brackets in tables), F11, F14,
F9 and F13 (foreign errors at the door), and the length of messages.
"""

from __future__ import annotations

import ast
import errno
import io
import json
import logging
import os
import re
import struct
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

import mixofshow
from mixofshow import cli
from mixofshow.bases.loading import load_base
from mixofshow.cli.options import assignments
from mixofshow.errors import BadInputError, BaseModelError, MixOfShowError, ResourceError, SettingsError, ours, shown
from mixofshow.evaluation.suite import make_suite
from mixofshow.fusion.jobs import inputs_of
from mixofshow.progress import terminal_bar
from mixofshow.reading import MAX_YAML_BYTES, named_in, parse_json, parse_table, parse_value, read_bytes, read_table
from mixofshow.sampling.composition import make_composition, parse_size
from mixofshow.sampling.replay import read_note
from mixofshow.tables import Settings
from mixofshow.terminal import print_table, say
from mixofshow.tuning.settings import make_settings

SOURCE = Path(mixofshow.__file__).parent
BELOW = sorted(
    {*SOURCE.rglob("*.py")}
    - {*SOURCE.glob("cli/*"), SOURCE / "demo.py", *SOURCE.glob("studio/*")}
    - {SOURCE / "federation" / name for name in ("center.py", "join.py", "launch.py")}
)
"""What people use from Python; the studio shows command lines, and center, join and launch start Flower's commands."""
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{k}: &a{k} {{<<: [*a{k - 1}, *a{k - 1}]}}\n" for k in range(1, 26))
ALIASES = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE_YAML = {
    "aliases": (ALIASES, "over 20000 values"),
    "merges": (MERGES, "over 20000 values"),
    "lists in lists": ("[" * 20_000, "nested deeper than 16"),
    "tables in tables": ("{a: " * 5_000, "nested deeper than 16"),
    "itself": ("a: &a [*a]", "stands for nothing before it"),
    "a date": ('a: !!timestamp "2001-99-99"', "timestamp"),
    "no number": ('a: !!int "abc"', "'abc' is no int"),
    "an empty number": ('a: !!int ""', "'' is no int"),
    "no number with a point": ("a: !!float x", "is no float"),
    "no switch": ("a: !!bool x", "is no bool"),
    "a long number": ("a: " + "9" * 5_000, "is too large"),
    "a large number": ("a: " + "9" * 40, "is too large"),
    "without end": ("a: .inf", "not a finite number"),
    "no number at all": ("a: .nan", "not a finite number"),
    "over all numbers": ("a: 1e400", "not a finite number"),
    "half a character": (r'a: "\ud800"', "half a character"),
    "no character": (r'a: "\UFFFFFFFF"', "not valid YAML"),
    "a version": ("%YAML " + "9" * 5_000 + ".1\n---\na: 1", "not valid YAML"),
    "an object": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "a key twice": ("steps: 3\nsteps: 4", "line 2: the key 'steps' stands here twice"),
    "a list as a key": ("{[a]: 1}", "expected a text as a key"),
    "two documents": ("a: 1\n---\nb: 2", "not valid YAML"),
    "a list": ("[1]", "expected a table of settings, found list"),
    "nothing": ("", "expected a table of settings, found NoneType"),
}


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_hostile_yaml_is_refused_in_one_line_at_once(name, tmp_path):
    text, message = HOSTILE_YAML[name]
    (tmp_path / "a.yaml").write_text(text)
    started = time.monotonic()
    with pytest.raises(SettingsError, match=message) as error:
        read_table(tmp_path / "a.yaml")
    assert time.monotonic() - started < 1
    assert str(error.value).isprintable() and len(str(error.value).removeprefix(str(tmp_path))) < 200


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),  # a text in YAML 1.1
        ("no", "no"),  # not a switch: it is a word of prompts
        ("1:30", "1:30"),
        ("2001-01-01", "2001-01-01"),
        ("010", 10),
        ("0x1F", 31),
        ("~", None),
        ("True", True),
        (".5", 0.5),
        ("-3.", -3.0),
        ("'3'", "3"),
        ("!!str 3", "3"),
        ("{1: a, no: b, ~: c}", {"1": "a", "no": "b", "~": "c"}),
        ("{a: &a {x: 1, y: 2}, b: {<<: *a, y: 3}}", {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}),
        ("{a: &a [1], b: *a}", {"a": [1], "b": [1]}),
        ("{a: &a 5, *a : b}", {"a": 5, "5": "b"}),
    ],
)
def test_yaml_is_its_core_schema(text, value):
    assert parse_value(text, "here") == value


def test_switches_may_still_be_yes_or_no():
    assert [TypeAdapter(bool).validate_python(parse_value(text, "here")) for text in ("yes", "off")] == [True, False]


def test_values_on_the_command_line_are_read_the_same():
    assert assignments(["ridge=1e-6"]) == {"ridge": 1e-6}
    with pytest.raises(SettingsError, match="'a=!!int x': not valid YAML"):
        assignments(["a=!!int x"])


@pytest.mark.parametrize("read", [read_table, read_bytes])
def test_only_regular_files_are_read_and_no_more_than_is_allowed(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        with pytest.raises(MixOfShowError, match="not a regular file"):
            read(tmp_path / name)
    with pytest.raises(MixOfShowError, match="not a regular file"):
        read(tmp_path)
    with pytest.raises(MixOfShowError, match="cannot be read"):
        read(tmp_path / ("n" * 300))
    (tmp_path / "large").write_bytes(bytes(MAX_YAML_BYTES + 1))
    with pytest.raises(SettingsError, match=f"{MAX_YAML_BYTES + 1} bytes, at most {MAX_YAML_BYTES} are read"):
        read_table(tmp_path / "large")


def test_what_a_table_names_lies_beside_it_or_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    there = Path("there")
    assert named_in(there, "a/b") == there / "a" / "b"
    assert named_in(there, "~/a") == tmp_path / "a"
    assert named_in(there, "/a") == Path("/a")
    assert named_in(there, "~nobody-of-this-name/a") == there / "~nobody-of-this-name" / "a"
    table = {"name": "dog", "class_word": "dog", "data": "~/pictures", "masks": "~/masks", "prior.data": "~/prior"}
    settings = make_settings(table)
    assert [settings.data, settings.masks, settings.prior.data] == [
        tmp_path / name for name in ("pictures", "masks", "prior")
    ]
    concept = {"name": "cat", "kind": "object", "class_word": "cat", "folder": "~/cat", "files": {"lora": "~/x"}}
    (suite,) = make_suite({"concepts": [concept], "methods": ["lora+average"]}).concepts
    assert (suite.folder, suite.files["lora"]) == (tmp_path / "cat", tmp_path / "x")
    (tmp_path / "list.yaml").write_text("concepts: [~/a.safetensors]")
    assert tmp_path / "a.safetensors" in inputs_of([tmp_path / "list.yaml"])
    Image.new("RGB", (8, 8)).save(tmp_path / "rough.png")
    assert make_composition({"prompt": "a", "image": "~/rough.png"}, folder=there).image
    with pytest.raises(BaseModelError, match=f"{tmp_path}/none: "):
        load_base("~/none")


@pytest.mark.parametrize("table", [None, 5, [1], "x", {"self": 1}, {"cls": 1}, {"": 1}, {1: 2}])
def test_a_table_of_settings_is_a_table_of_known_keys(table):
    with pytest.raises(SettingsError, match="here: (expected a table|unknown key)"):
        Settings.of(table, "here")


@pytest.mark.parametrize("text", ["²x64", "9" * 5_000 + "x64", "-8x8", "x", "8x", "1e3x8"])
def test_sizes_are_plain_numbers(text):
    with pytest.raises(SettingsError, match="expected WIDTHxHEIGHT"):
        parse_size(text)


def test_a_picture_that_is_replayed_is_a_regular_file_of_sane_size(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadInputError, match="regular file"):
        read_note(tmp_path / "pipe.png")
    data = io.BytesIO()
    Image.new("L", (1, 1)).save(data, "PNG")
    head = b"IHDR" + struct.pack(">II", 60_000, 60_000) + data.getvalue()[24:29]
    bomb = data.getvalue()[:12] + head + struct.pack(">I", zlib.crc32(head)) + data.getvalue()[33:]
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(BadInputError, match="bomb.png: "):
        read_note(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', '{"a": 1, "a": 2}', '"\\ud800"', "[" * 9999, "9" * 5000]
)
def test_json_is_finite_and_can_be_written_again(text):
    with pytest.raises(BadInputError, match="here: not valid JSON") as error:
        parse_json(text, "here")
    assert len(str(error.value)) < 200
    assert parse_json("-Infinity", "here", finite=False) == float("-inf")  # as diffusers' schedulers have it
    assert parse_json(r'"\ud83d\ude00"', "here") == "😀"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\x1b[31mb\nc", r"a\x1b[31mb\nc"),
        ("\u202egnp", r"\u202egnp"),
        ("犬 é", "犬 é"),
        ("n" * 100, "n" * 79 + "…"),
        (Path("/a" * 100 + "/the end"), "…" + "a/" * 35 + "a/the end"),
        ([1] * 10_000, "[" + "1, " * 20 + "...]"),
        pytest.param(10**5_000, "a number of 16610 bits", id="a long number"),
    ],
)
def test_strangers_text_is_escaped_and_cut(value, text):
    assert shown(value) == text


def test_every_error_is_one_line_that_can_be_printed():
    for path in ("a\x1b[31mb", "a\nb", "\u202egnp.exe", "\ud800"):
        assert str(SettingsError(f"{path}: no such thing")).isprintable()


def test_notices_and_results_are_lines_that_can_be_printed(capsys):
    record = logging.LogRecord("a", logging.WARNING, "", 0, "%s is odd", ("a\x1b[2Jb\nc",), None)
    assert cli._OneLine().format(record) == r"a\x1b[2Jb\nc is odd"
    say(Path("a\x1b[2J"), "b")
    assert capsys.readouterr().out == "a\\x1b[2J\nb\n"


@pytest.mark.parametrize("name", ["[/]", "[/nope]", "[bold]", "a\x1b[31m", "\u202eb", "\a"])
def test_tables_show_names_as_they_are(name, capsys):
    print_table(("a", "b"), [(name, ("loud", "red"))])
    assert shown(name) in capsys.readouterr().out


FOREIGN = {
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "/x/y"), ResourceError, "/x/y: No space left"),
    "a forbidden file": (PermissionError(errno.EACCES, "Permission denied", "/x"), ResourceError, "/x: Permission"),
    "a name too long": (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 9000), BadInputError, "too long"),
    "a full disk, says safetensors": (
        SafetensorError('I/O error: IoError(Os { code: 28, message: "No space left on device" })'),
        ResourceError,
        "No space left",
    ),
    "no memory": (MemoryError(), ResourceError, "out of memory"),
    "a full GPU": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        ResourceError,
        "out of memory",
    ),
    "no memory, says torch": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        ResourceError,
        "out of memory",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_errors_become_ours_at_the_door(name, monkeypatch, capsys):
    error, kind, message = FOREIGN[name]
    assert type(ours(error)) is kind

    def broken() -> None:
        raise error

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.setattr(sys, "argv", ["mixofshow"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    line = capsys.readouterr().err
    assert stopped.value.code == kind.exit_code
    assert line.startswith("error: ") and message in line and line.count("\n") == 1 and len(line) <= 310


def test_a_model_of_pydantic_tells_its_field():
    with pytest.raises(ValidationError) as error:
        TypeAdapter(dict[str, int]).validate_python({"a": "x\x1b"})
    assert "'a': input should be a valid integer" in str(ours(error.value))


def test_what_is_a_bug_is_not_ours():
    assert ours(ZeroDivisionError()) is None and ours(RuntimeError("shapes")) is None and ours(OSError("odd")) is None


def test_long_messages_are_cut_in_the_middle_unless_asked_for(monkeypatch, capsys):
    message = "/a" * 30_000 + ": not a regular file"

    def broken() -> None:
        assert "--debug" not in sys.argv
        raise SettingsError(message)

    monkeypatch.setattr(cli, "app", broken)
    for arguments, length in ((["sample"], 308), (["sample", "--debug"], 60_000)):
        monkeypatch.setattr(sys, "argv", ["mixofshow", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        *above, line = capsys.readouterr().err.splitlines()
        assert line.endswith(": not a regular file")
        assert (len(line) > length, bool(above)) == ("--debug" in arguments,) * 2


@pytest.mark.parametrize("speaks", ["error", "notice"])
def test_settings_are_named_as_who_reads_writes_them(speaks, monkeypatch, capsys):
    """As Python has them below the command line, and there as options."""

    def broken() -> None:
        if speaks == "notice":
            logging.getLogger("mixofshow").warning("%s", "`clip_skip` sets it, `captions.synonyms` too; `mixofshow it`")
        raise SettingsError("`skip_bad` leaves it out")

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.setattr(sys, "argv", ["mixofshow"])
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with pytest.raises(SystemExit):
        cli.main()
    notices = ["--clip-skip sets it, --captions.synonyms too; `mixofshow it`"] if speaks == "notice" else []
    assert capsys.readouterr().err.splitlines() == [*notices, "error: --skip-bad leaves it out"]


@pytest.mark.parametrize("path", BELOW, ids=str)
def test_nothing_below_the_command_line_speaks_of_its_options(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    docs = {
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    assert [text for text in texts - docs if re.search(r"(?<![\w-])--[a-z]+", text)] == []


@pytest.mark.parametrize("terminal", [False, True])
def test_an_error_amid_a_progress_bar_is_one_line(terminal, monkeypatch, capsys):
    """In a file an empty line stood before it."""
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))

    def broken() -> None:
        with terminal_bar("drawing") as progress:
            progress(1, 2, {})
            raise SettingsError("that is all")

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.setattr(sys, "argv", ["mixofshow"])
    with pytest.raises(SystemExit):
        cli.main()
    written = capsys.readouterr().err
    assert ("drawing" in written) == terminal
    last_erased = written.rpartition("\x1b[2K")[2]
    assert last_erased == "error: that is all\n"


def test_a_table_keeps_what_json_can_hold():
    table = parse_table("{prompt: 'a dog', seed: 3, regions: [{box: [0, 0, 1.5, 2]}], image: ~}", "here")
    assert json.loads(json.dumps(table)) == table
