"""What `make dist` builds: everything that belongs to the package is in the wheel, and it runs from there alone."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import mixofshow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make dist` does: out of the source archive, so that this is complete, too."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT))
    assert len(list(out.glob("mixofshow-*.tar.gz"))) == 1
    (built,) = out.glob("*.whl")
    return built


def run(*command: str, cwd: Path = ROOT) -> str:
    """Standard output of a command that must succeed; without PYTHONPATH, which would bring in the checkout."""
    done = subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of(folder: Path) -> set[str]:
    """Files below a folder, without what running leaves there."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_has_the_package_and_the_examples_and_nothing_else(wheel: Path) -> None:
    found = set(zipfile.ZipFile(wheel).namelist())
    about = f"mixofshow-{mixofshow.__version__}.dist-info"
    kept = "src/mixofshow/bases"
    licences = ("LICENSE", f"{kept}/emojiland/icons/LICENSES.md", f"{kept}/original/LICENSES.md")
    expected = {
        *(f"mixofshow/{name}" for name in files_of(ROOT / "src" / "mixofshow")),
        *(f"mixofshow/examples/{name}" for name in files_of(ROOT / "examples")),
        *(f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")),
        *(f"{about}/licenses/{name}" for name in licences),
    }
    assert found == expected


def test_the_wheel_has_what_the_demo_needs(wheel: Path) -> None:
    found = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "py.typed",
        "bases/emojiland/weights/unet/diffusion_pytorch_model.safetensors",
        "bases/emojiland/judge/model.safetensors",
        "bases/emojiland/controls/controlnet/diffusion_pytorch_model.safetensors",
        "bases/emojiland/icons/twemoji.png",
        "examples/concepts/clown.safetensors",
    ):
        assert f"mixofshow/{needed}" in found


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    here, place = tmp_path / "environment", tmp_path / "empty"
    place.mkdir()
    venv.create(here, symlinks=True)
    python = str(here / "bin" / "python")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(wheel))
    # The packages it depends on are lent by this environment: behind its own, and without what their .pth files add.
    (own,) = (here / "lib").glob("python*/site-packages")
    (own / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    origin = run(python, "-c", "import mixofshow; print(mixofshow.__file__)", cwd=place)
    assert Path(origin.strip()).is_relative_to(own)
    run(str(here / "bin" / "mixofshow"), "demo", "--quick", cwd=place)
    assert files_of(place) >= {"out/demo/report.html", "out/demo/summary.json", "out/demo/model/model_index.json"}
