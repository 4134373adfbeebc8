"""Twenty-five faults of one line, each in a copy of everything, and whether the tests of its part find it.

    python tests/mutations.py              # all; half an hour on one core
    python tests/mutations.py regions      # those in files with this in their path

Exit code 1 where more than one is not found. At night, as `pytest -m slow` is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
LEFT_OUT: Final = shutil.ignore_patterns(".*", "__pycache__", "out", "runs", "dist")
MAY_SURVIVE: Final = 1


@dataclass(frozen=True)
class Mutation:
    """A text that stands once in a file of the package, what takes its place, and the tests that should mind."""

    file: str
    old: str
    new: str
    tests: str


MUTATIONS: Final = [
    Mutation(*one)
    for one in (
        # Fusing
        ("fusion/methods.py", "sums.rhs - middle @ sums.moments, ridge", "sums.rhs, ridge", "fusion/test_problem.py"),
        ("fusion/methods.py", "/ sum(problem.weights)", "/ len(problem.weights)", "fusion/test_problem.py"),
        ("fusion/problem.py", "self.energy - 2 * inner(", "self.energy - inner(", "fusion/test_problem.py"),
        ("fusion/problem.py", "[self.weights[k] for k in kept]", "self.weights[: len(kept)]", "fusion/test_problem.py"),
        (
            "fusion/statistics.py",
            "rows[:, block.start :]\n",
            "rows[:, block.start :] / 1.001\n",
            "fusion/test_recording.py",
        ),
        (
            "fusion/statistics.py",
            "half[block, block.stop :].T",
            "half[block.stop :, block]",
            "fusion/test_recording.py",
        ),
        ("fusion/solving.py", "max(own, QUIET**2 * output)", "own", "fusion/test_guard.py"),
        ("fusion/guard.py", "<= OPPOSED}", "<= 2 * OPPOSED}", "fusion/test_guard.py"),
        # Regions
        ("sampling/regions.py", "math.ceil(start * count", "math.floor(start * count", "sampling/test_shapes.py"),
        ("sampling/regions.py", "(start + end) / 2 * count", "start * count", "sampling/test_shapes.py"),
        ("sampling/attention.py", "self.first_step <= step", "self.first_step < step", "sampling/test_attention.py"),
        ("sampling/attention.py", "sorted(found, reverse=True)", "sorted(found)", "laws/test_regions.py"),
        ("sampling/attention.py", "left = left * (1 - taken)", "left = left - taken", "laws/test_regions.py"),
        # Tuning
        ("tuning/losses.py", "(error * mask).sum", "error.sum", "tuning/test_golden_training.py"),
        ("tuning/losses.py", "scaled[small == 0]", "scaled[small == 1]", "tuning/test_golden_training.py"),
        (
            "tuning/run.py",
            "self.words.moving.grad = None",
            "pass",
            "tuning/test_laws.py::test_words_stop_at_the_norm_limit",
        ),
        (
            "tuning/run.py",
            'self.words_move = state["words_move"]',
            "pass",
            "tuning/test_resume.py::test_words_that_stopped_stay_stopped",
        ),
        # Devices
        (
            "concepts/words.py",
            "one.to(vectors[0].device).expand",
            "one.expand",
            "devices/test_one_device.py::test_concepts_in_memory_draw_on_a_model_from_a_folder",
        ),
        (
            "concepts/adapters.py",
            "own[name].to(parameter.device)",
            "own[name]",
            "devices/test_one_device.py::test_a_model_that_is_offloaded_draws_the_same",
        ),
        ("tuning/losses.py", "noise.to(latents)", "noise", "devices/test_one_device.py::test_tuning"),
        # Memory
        (
            "sampling/attention.py",
            "        handle.forget()\n",
            "",
            "bases/test_memory.py::test_keys_and_values_go_with_their_picture",
        ),
        (
            "sampling/loaders.py",
            "replace(model, pipeline=None)",
            "model",
            "bases/test_memory.py::test_a_pipeline_and_its_weights_go_at_once",
        ),
        # Files
        ("concepts/concept.py", "            digest.update(raw(tensor))\n", "", "laws/test_concept_file.py"),
        ("tuning/checkpoints.py", "archive.testzip()", "None", "tuning/test_checkpoints.py"),
        ("outputs.py", "if _inside(path, one):", "if _inside(one, path):", "cases/test_outputs_and_inputs.py"),
    )
]


def is_found(mutation: Mutation) -> bool:
    """Whether its tests fail with the mutation, in a copy of everything."""
    with tempfile.TemporaryDirectory() as folder:
        # All of it, tests as well: a fault may write where nothing should be written.
        shutil.copytree(ROOT, folder, copy_function=os.symlink, ignore=LEFT_OUT, dirs_exist_ok=True)
        file = Path(folder, "src", "mixofshow", mutation.file)
        text = file.read_text(encoding="utf-8")
        if (count := text.count(mutation.old)) != 1:
            raise SystemExit(f"{mutation.file}: '{mutation.old}' stands there {count} times, expected once")
        file.unlink()
        file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", f"tests/{mutation.tests}"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": f"{folder}/src"},
            capture_output=True,
            text=True,
            check=False,
        )
    last = (done.stdout.splitlines() or [""])[-1]
    if not re.match(r"\d+ (passed|failed|error)", last):  # they could not run at all, which finds nothing
        raise SystemExit(f"{mutation.file}: '{mutation.new}': {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode != 0


def main(words: list[str]) -> int:
    """Try those whose file has one of the words in its path, and say what was found."""
    chosen = [one for one in MUTATIONS if not words or any(word in one.file for word in words)]
    survived = 0
    for one in chosen:
        found = is_found(one)
        survived += not found
        print(f"{'found   ' if found else 'SURVIVES'} {one.file}: {one.old.strip()} -> {one.new.strip()}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} found")
    return int(survived > MAY_SURVIVE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
