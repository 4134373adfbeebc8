"""What a round costs for each client: seconds and bytes, with 2, 8 and 32 clients.

    python benchmarks/federation.py [--counts 2,8,32] [--json FILE]

The clients are simulated in this process, one after the other, by the very functions that a SuperNode would run, and
each loads the base for itself, as a process of its own would. Each hands over a concept file, records its own moments
(so little that it costs nothing: one step of one prompt), and gets the fused model. The concepts are the examples'
changes of attention, under as many names as there are clients. What Flower's programs add is not in these figures.
Seconds are the processor's, on one thread, so that others who use the machine are not in them.
What a thousand clients would need is reckoned from the two largest rounds. The first round is not counted: it warms up.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import platform
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch
from figures import keep
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from simulated import Answer, LocalGrid, honest

from mixofshow.concepts.concept import Concept, load_concept
from mixofshow.federation.center import CenterState
from mixofshow.federation.plan import Plan
from mixofshow.federation.rounds import Round

EXAMPLES: Final = Path(__file__).parents[1] / "examples" / "concepts"
PROMPTS: Final = ["photo of a {}"]
THOUSAND: Final = 1000
LITTLE: Final = {"steps": 1, "prompts": PROMPTS, "picture_prompts": PROMPTS, "mode": "independent"}


@dataclasses.dataclass
class Meter:
    """A client, and what it took and gave; its seconds are the processor's."""

    answer: Answer
    seconds: float = 0.0
    seconds_with_measuring: float = 0.0
    sent: int = 0
    received: int = 0

    def __call__(self, message: Message) -> Message:
        """Its answer."""
        came = time.process_time()
        self.received += size(message.content)
        started = time.process_time()
        reply = self.answer(message)
        self.seconds += time.process_time() - started
        self.sent += size(reply.content)
        self.seconds_with_measuring += time.process_time() - came
        return reply


def size(content: RecordDict) -> int:
    """Bytes of a message's content, as Flower sends it."""
    content = copy.deepcopy(content)  # what was made ready to send cannot be copied any more
    arrays = [array for record in content.array_records.values() for array in record.values()]
    return sum(len(part.deflate()) for part in content.values()) + sum(len(array.data) for array in arrays)


def renamed(number: int) -> Concept:
    """One of the examples, as another concept."""
    files = sorted(EXAMPLES.glob("*.safetensors"))
    concept = load_concept(files[number % len(files)])
    name = f"{concept.info.name}{number}"
    info = concept.info.model_copy(update={"name": name, "words": (f"<{name}a>", f"<{name}b>")})
    deltas = {layer: change for layer, change in concept.deltas.items() if "attn" in layer}
    return dataclasses.replace(concept, info=info, deltas=deltas)


def measured(count: int, folder: Path) -> dict[str, Any]:
    """A round of so many clients."""
    clients: dict[int, Meter] = {}
    for number in range(1, count + 1):
        concept, own = renamed(number), folder / f"client-{number}"
        own.mkdir()
        concept.save(own / "concept.safetensors")
        offer = {"name": concept.info.name, "concept": own / "concept.safetensors", "approve": "always", "want_model": True}
        clients[number] = Meter(honest(own, **offer))
    grid = LocalGrid(dict(clients), {number: f"client-{number}" for number in clients})
    place = folder / "rounds" / "1"
    place.mkdir(parents=True)
    made = Round(grid, folder, place, Plan(moments=True, fuse=LITTLE), CenterState(base="emojiland"), Context(1, 0, {}, RecordDict(), {}))
    started = time.process_time()
    made.run()
    total, report = time.process_time() - started, made.report
    if len(report.members) != count or report.refused or not report.fused:
        raise RuntimeError(f"the round failed: {report}")
    of_center = total - sum(one.seconds_with_measuring for one in clients.values())
    return {
        "clients": count,
        "seconds_of_a_client": round(sum(one.seconds for one in clients.values()) / count, 2),
        "center_seconds_per_client": round(of_center / count, 2),
        "bytes_from_a_client": sum(one.sent for one in clients.values()) // count,
        "bytes_to_a_client": sum(one.received for one in clients.values()) // count,
    }


def for_a_thousand(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a thousand would need: seconds for each as in the largest round, bytes on a line through the two largest.

    The model that each client gets grows with the number of concepts, whose words are in it.
    """
    some, most = sorted(rows, key=lambda row: row["clients"])[-2:]
    each = {}
    for key in ("bytes_from_a_client", "bytes_to_a_client"):
        slope = (most[key] - some[key]) / (most["clients"] - some["clients"])
        each[key] = most[key] + slope * (THOUSAND - most["clients"])
    return {
        "minutes_of_the_center": round(THOUSAND * most["center_seconds_per_client"] / 60, 1),
        "gigabytes_to_the_center": round(THOUSAND * each["bytes_from_a_client"] / 1e9, 1),
        "gigabytes_from_the_center": round(THOUSAND * each["bytes_to_a_client"] / 1e9, 1),
    }


def main() -> None:
    """Measure, print, and write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--counts", default="2,8,32")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    torch.set_num_threads(1)
    for identity in ("_run_id", "_node_id", "_task_id"):  # what Flower's processes have
        setattr(TaskIdentity, identity, 1)
    counts, rows = [int(count) for count in given.counts.split(",")], []
    if len(counts) < 2:
        options.error("--counts: two at least, for the line through them")
    with tempfile.TemporaryDirectory() as folder:
        measured(counts[0], Path(folder))
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(count, Path(folder)))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    facts = {"python": platform.python_version(), "torch": torch.__version__, "threads": 1}
    keep({**facts, "results": rows, "for_a_thousand": for_a_thousand(rows)}, given.json)
    print("a thousand:", "  ".join(f"{key} {value}" for key, value in for_a_thousand(rows).items()))


if __name__ == "__main__":
    main()
