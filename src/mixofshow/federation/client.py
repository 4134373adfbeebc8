"""The client's app: what runs beside the pictures, in a process of Flower's, for each message of the center.

Whatever goes wrong is told in full here, in the client's own log, and to the center in words that we chose: an error's
text may hold a path, a caption or a host name, and Flower would send it.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from mixofshow.errors import BadInputError
from mixofshow.federation.apps import begin_app
from mixofshow.federation.messages import (
    ASKED_OF_SUMS,
    MAX_RECORDING,
    REFUSED,
    Value,
    content_of,
    file_of,
    values_of,
)
from mixofshow.federation.owner import (
    ClientSettings,
    Declined,
    approved,
    approved_before,
    note_wrong,
    own_concept,
    read_settings,
)

logger = logging.getLogger(__name__)
FAILED: Final = "could not do it; the client's own log says why"
SUMS: Final = "-sums"
RECORDINGS: Final = "-recordings"
"""Behind a concept's hash: what its owner said of its sums, or recordings, which is not what was said of the file."""
Reply = tuple[Mapping[str, Value], Mapping[str, bytes]]
Handler = Callable[[Message, Path, ClientSettings], Reply]
app = ClientApp()


def answering(handler: Handler) -> Callable[[Message, Context], Message]:
    """The handler as Flower calls it: whatever it raises becomes a reply that gives nothing of the owner's away."""

    def handle(message: Message, context: Context) -> Message:
        """The reply to a message."""
        values: Mapping[str, Value]
        folder = Path(str(context.node_config["folder"]))
        try:
            begin_app(folder)
            values, files = handler(message, folder, read_settings(folder))
        except Exception as error:
            values, files = {REFUSED: _refusal(folder, error)}, {}
        return Message(content_of(values, files), reply_to=message)

    return handle


def _refusal(folder: Path, error: Exception) -> str:
    """Tell the owner what went wrong, in the log and at the terminal; returns what the center may know of it."""
    with contextlib.suppress(Exception):  # on a disk that is full; what is raised here Flower sends, paths and all
        note_wrong(folder, error)
    if isinstance(error, Declined):
        logger.warning("declined: %s", error)
        return str(error)
    logger.error("a message could not be answered", exc_info=error)
    return FAILED


def hello(message: Message, folder: Path, settings: ClientSettings) -> Reply:
    """Who is here, with what. Imports nothing that takes seconds."""
    from mixofshow import __version__

    _asked(message, {})
    offer = {"name": settings.name, "class_word": settings.class_word, "version": __version__}
    return {**offer, "judges": settings.judge is not None, "wants_model": settings.want_model}, {}


def concept(message: Message, folder: Path, settings: ClientSettings) -> Reply:
    """The concept's file, once its owner approves; unless the center has this content already."""
    from mixofshow.concepts.concept import load_concept
    from mixofshow.federation.plan import tunable

    asked = _asked(message, {"fingerprint": str, "tune": str, "has": str})
    pipeline = _base(settings, asked["fingerprint"])
    path = own_concept(folder, settings, pipeline, tunable(json.loads(asked["tune"])))
    found = load_concept(path, pipeline)
    if found.hash == asked["has"]:
        return {"hash": found.hash}, {}
    size = path.stat().st_size / 2**20
    question = f"send <{found.info.name}> ({size:.2f} MB, content {found.hash[:12]}) to the center?"
    if not approved(folder, settings, found.hash, question):
        raise Declined("its owner does not approve")
    return {"hash": found.hash}, {"concept": path.read_bytes()}


def moments(message: Message, folder: Path, settings: ClientSettings) -> Reply:
    """What the concept's own model sees in its layers, recorded here so that the center need not draw."""
    from mixofshow.concepts.concept import load_concept
    from mixofshow.federation.plan import tunable
    from mixofshow.fusion.settings import RecordingSettings
    from mixofshow.fusion.stages import record_concept
    from mixofshow.fusion.store import Store

    asked = _asked(message, {"fingerprint": str, "tune": str, "record": str})
    pipeline = _base(settings, asked["fingerprint"])
    found = load_concept(own_concept(folder, settings, pipeline, tunable(json.loads(asked["tune"]))), pipeline)
    if not approved(folder, settings, found.hash + RECORDINGS, f"send recordings of <{found.info.name}> to the center?"):
        raise Declined("its owner does not approve")
    how = RecordingSettings.of(json.loads(asked["record"]), "the center's settings")
    recording = record_concept(found, pipeline, how, Store(folder / "recordings"))
    return {"hash": found.hash}, {"recording": recording.file.path.read_bytes()}


def model(message: Message, folder: Path, settings: ClientSettings) -> Reply:
    """Keep the fused model, which the owner asked for."""
    from mixofshow.concepts.delta import load_delta
    from mixofshow.outputs import writing

    _asked(message, {})
    if not settings.want_model:
        raise Declined("did not ask for the model")
    data = file_of(message, "model", MAX_RECORDING)
    with writing(folder / "fused.safetensors") as temporary:
        temporary.write_bytes(data)
        load_delta(temporary)
    return {}, {}


def judge(message: Message, folder: Path, settings: ClientSettings) -> Reply:
    """Figures of the fused model, by the client's own held-out pictures."""
    from mixofshow.concepts.concept import load_concept
    from mixofshow.concepts.delta import load_delta
    from mixofshow.concepts.model import delta_model
    from mixofshow.evaluation.scorers import scorer_for
    from mixofshow.federation.judging import judge as judged
    from mixofshow.federation.plan import tunable
    from mixofshow.outputs import scratch

    asked = _asked(message, {"fingerprint": str, "tune": str})
    if settings.judge is None:
        raise Declined("judges nothing")
    pipeline = _base(settings, asked["fingerprint"])
    with scratch() as place:
        (place / "model.safetensors").write_bytes(file_of(message, "model", MAX_RECORDING))
        fused = delta_model(load_delta(place / "model.safetensors"), pipeline, "the center's model")
    own = load_concept(own_concept(folder, settings, pipeline, tunable(json.loads(asked["tune"]))), pipeline)
    scorer = scorer_for(settings.base, settings.clip, device=settings.device)
    return judged(pipeline, fused, own, settings.judge, scorer), {}


def words(message: Message, folder: Path, settings: ClientSettings) -> Reply:
    """For secure rounds: the concept's words, which the model needs, and which layers it changes, not how."""
    import dataclasses

    from mixofshow.concepts.concept import load_concept
    from mixofshow.federation.plan import tunable
    from mixofshow.outputs import scratch

    asked = _asked(message, {"fingerprint": str, "tune": str})
    pipeline = _base(settings, asked["fingerprint"])
    found = load_concept(own_concept(folder, settings, pipeline, tunable(json.loads(asked["tune"]))), pipeline)
    question = f"send the words of <{found.info.name}>, and its changes masked, to be summed with others'?"
    if not approved(folder, settings, found.hash + SUMS, question):
        raise Declined("its owner does not approve")
    with scratch() as place:
        dataclasses.replace(found, deltas={}).save(place / "words.safetensors")
        return {"layers": "\n".join(found.deltas)}, {"words": (place / "words.safetensors").read_bytes()}


def sums(message: Message, context: Context) -> Message:
    """A step of secure aggregation. What the owner did not approve is not summed."""
    from mixofshow.federation.secure import masked

    folder = Path(str(context.node_config["folder"]))
    try:
        begin_app(folder)
        return masked(message, context, lambda asked: _limbs(asked, folder, read_settings(folder)))
    except Exception as error:
        raise RuntimeError(_refusal(folder, error)) from error  # Flower sends its text


def _limbs(message: Message, folder: Path, settings: ClientSettings) -> list[Any]:
    from mixofshow.concepts.concept import load_concept
    from mixofshow.federation.plan import tunable
    from mixofshow.federation.sums import SumsShape, own_terms
    from mixofshow.fusion.settings import FusionSettings

    asked = values_of(message, dict.fromkeys(("fingerprint", "tune", "fuse", "layers"), str), ASKED_OF_SUMS)
    pipeline = _base(settings, asked["fingerprint"])
    found = load_concept(own_concept(folder, settings, pipeline, tunable(json.loads(asked["tune"]))), pipeline)
    if settings.approve != "always" and not approved_before(folder, found.hash + SUMS):
        raise Declined("its owner does not approve")
    shape = SumsShape.of(pipeline, asked["layers"].splitlines())
    how = FusionSettings.of(json.loads(asked["fuse"]), "the center's settings")
    return shape.packed(own_terms(shape, found, how))


def _asked(message: Message, expected: Mapping[str, type]) -> dict[str, Any]:
    """What the center asks for. Raises Declined for another version of the protocol."""
    try:
        return values_of(message, expected)
    except BadInputError as error:
        raise Declined(f"does not understand the center: it {error}") from error


def _base(settings: ClientSettings, fingerprint: str) -> Any:
    """The client's own base. Raises Declined unless it is the center's."""
    from mixofshow.bases.loading import fingerprint as fingerprint_of
    from mixofshow.bases.loading import load_base

    pipeline = load_base(settings.base, device=settings.device)
    if (own := fingerprint_of(pipeline)) != fingerprint:
        raise Declined(f"has another base model: its fingerprint is {own}, the center's {fingerprint[:32]}")
    return pipeline


app.query("hello")(answering(hello))
app.train("concept")(answering(concept))
app.query("moments")(answering(moments))
app.query("model")(answering(model))
app.query("words")(answering(words))
app.train()(sums)
app.evaluate("judge")(answering(judge))
