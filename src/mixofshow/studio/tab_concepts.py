"""The second tab: the shelf of concepts, files from elsewhere, and fusing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from mixofshow.concepts.interchange.settings import ImportSettings
from mixofshow.fusion.settings import FusionSettings
from mixofshow.studio import fusing, shelf
from mixofshow.studio import web as gr
from mixofshow.studio.compose import Studio
from mixofshow.studio.drawing import draw_portraits
from mixofshow.studio.editor import cards_for, concept_shelf
from mixofshow.studio.forms import component, fields_of, table_of
from mixofshow.studio.jobs import Job, outcome

TAKING: Final = "take in"
ASKED: Final = ("name", "words", "class_word", "unet_alpha", "text_encoder_alpha")
"""What can be said of another tool's file."""
PORTRAIT: Final = 192
"""Of a concept on its card, in pixels."""


class ConceptsTab:
    """The parts of the tab by name, and what happens between them."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.asked = [one for one in fields_of(ImportSettings.model_json_schema()) if one.key in ASKED]
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=340):
                self._shelf()
            with gr.Column(scale=2, min_width=320):
                self._fusing()
        self.seen = gr.State(None)
        self._connect()

    def _shelf(self) -> None:
        gr.HTML(gr.line("What is ticked is fused, as strong as it says."))
        self.ticked = concept_shelf()
        self.wrong = gr.HTML(elem_id="shelf-said")
        with gr.Row():
            self.portraits = gr.Button("Draw their portraits", elem_id="portraits")
            self.away = gr.Button("Take the ticked ones off the shelf", elem_id="away")
        with gr.Accordion("Add a concept", open=False):
            label = "A concept file, or another tool's LoRA or embedding"
            self.dropped = gr.File(label=label, height=gr.ROOM, elem_id="concept-file")
            self.how = [component(one) for one in self.asked]
            self.take = gr.Button("Add it", elem_id="take-in")
        self.taken = gr.HTML(elem_id="take-said")

    def _fusing(self) -> None:
        self.name = gr.Textbox(value="fused", label="Name of the model", elem_id="model-name")
        with gr.Accordion("How it is fused", open=False, elem_id="fuse-settings"):
            self.settings = [component(one) for one in fusing.fusion_fields()]
        self.cost = gr.HTML(elem_id="cost")
        with gr.Row():
            self.fuse = gr.Button("Fuse", variant="primary", elem_id="fuse")
            self.stop = gr.Button("Cancel", elem_id="fuse-cancel")
        self.status = gr.HTML(elem_id="fuse-status")
        self.kept = gr.HTML(elem_id="kept")
        self.command = gr.Textbox(
            label="Does the same", interactive=False, lines=2, buttons=["copy"], elem_id="fuse-command"
        )
        self.report = gr.DownloadButton("Report", interactive=False, elem_id="fuse-report")

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        how = [self.ticked, self.name, *self.settings]
        costs = [self.cost, self.command, self.report]
        changes = [self.ticked.input, *(part.change for part in how[1:])]
        gr.on(changes, self.priced, how, costs, trigger_mode="always_last", **quiet)
        self.fuse.click(self.fused, how, [self.status, self.command], api_name="fuse", show_progress="hidden")
        self.stop.click(lambda: self.studio.jobs.stop(fusing.KIND), **quiet)
        self.take.click(self.take_in, [self.dropped, *self.how], self.taken, **quiet)
        self.portraits.click(self.draw_portraits, None, self.taken, **quiet)
        self.away.click(self.take_away, self.ticked, [self.wrong, self.ticked], **quiet)
        watched = [self.seen, self.ticked, self.wrong, self.taken, self.status, self.kept, self.report]
        gr.Timer(1).tick(self.watched, [self.seen, self.ticked], watched, **quiet)

    def priced(self, ticked: Any, name: str, *values: Any) -> list[Any]:
        """What fusing the ticked ones will cost, the command that does it, and the report of the model of that name.

        A list of strengths is a file, which is written when fusing begins; before that there is no command that reads it.
        """
        workspace = self.studio.workspace

        def act() -> tuple[str, str]:
            given = table_of(fusing.fusion_fields(), values)
            strengths = fusing.strengths_of(ticked)
            files, _ = fusing.sources(workspace, strengths)
            cost = fusing.cost(FusionSettings.of(given, "options"), len(strengths))
            there = all(file.is_file() for file in files)
            return cost, fusing.command(workspace, files, name, given) if there else ""

        found, _, error = outcome(act)
        report = _report(fusing.report_of(workspace.models / name) if fusing.NAME.fullmatch(name) else None)
        return [gr.line(error, bad=bool(ticked)), "", report] if error else [gr.line(found[0]), found[1], report]

    def fused(self, ticked: Any, name: str, *values: Any) -> list[Any]:
        """Begin to fuse; returns the line about it, and the command that does the same."""

        def act() -> tuple[str, str]:
            given, strengths = table_of(fusing.fusion_fields(), values), fusing.strengths_of(ticked)
            job = fusing.start_fusing(self.studio, strengths, name, given)
            files, _ = fusing.sources(self.studio.workspace, strengths)
            return job.line, fusing.command(self.studio.workspace, files, name, given)

        found, _, error = outcome(act)
        return [gr.line(error, bad=True), gr.skip()] if error else [gr.line(found[0]), found[1]]

    def take_in(self, path: str | None, *values: Any) -> str:
        """Begin to take a file in; returns the line about it."""
        if not path:
            return gr.line("drop a file first", bad=True)
        settings, _, error = outcome(lambda: table_of(self.asked, values))
        if error:
            return gr.line(error, bad=True)
        source = Path(path)

        def work(job: Job) -> list[Path]:
            job.said += shelf.taken_in(self.studio.workspace, source, source.name, settings)
            return []

        return gr.line(self.studio.jobs.submit(TAKING, f"adding {shelf.file_name(source.stem)}", work).line)

    def draw_portraits(self) -> str:
        """Begin to draw a picture of each concept that has none."""
        return gr.line(self.studio.jobs.submit(TAKING, "drawing portraits", self._portraits).line)

    def _portraits(self, job: Job) -> list[Path]:
        return draw_portraits(self.studio.engine, job)

    def take_away(self, ticked: Any) -> list[Any]:
        """Put the ticked concepts' files aside."""
        names, _, error = outcome(lambda: shelf.put_aside(self.studio.workspace, list(fusing.strengths_of(ticked))))
        said = f"put aside, into the folder removed: {', '.join(names or [])}"
        return [gr.line(error or (said if names else "tick concepts first"), bad=bool(error)), gr.HTML(value={})]

    def watched(self, seen: Any, ticked: Any) -> list[Any]:
        """What has changed since this page looked last."""
        jobs = self.studio.jobs
        fusion, taking = jobs.latest(fusing.KIND), jobs.latest(TAKING)
        there = shelf.cards(self.studio.workspace)
        lines = [job and (id(job), job.line, len(job.said)) for job in (fusion, taking)]
        wrong = shelf.unreadable(self.studio.workspace)
        now = [there, wrong, *lines]
        if now == seen:
            return [gr.skip()] * 7
        report = fusion.results[1] if fusion and len(fusion.results) > 1 else None
        same = seen is not None and seen[0] == there
        words = {card.word for card in there}
        still = {word: strength for word, strength in (ticked or {}).items() if word in words}
        left = (
            {} if len(still) == len(ticked or {}) else {"value": still}
        )  # else what is ticked meanwhile would be lost
        return [
            now,
            gr.skip() if same else gr.HTML(cards=cards_for(there, PORTRAIT), **left),
            gr.lines(wrong) if seen is None or wrong != seen[1] else gr.skip(),
            _told(taking) if taking else gr.skip(),
            _told(fusion) if fusion else "",
            fusing.bars(fusion.facts[1]) if fusion and fusion.facts else "",
            _report(report) if report else gr.skip(),
        ]


def _report(path: Path | None) -> Any:
    """The button that hands a report out, where there is one."""
    there = path is not None and path.is_file()
    return gr.DownloadButton(value=str(path) if there else None, interactive=there)


def _told(job: Job) -> str:
    return gr.line(job.line, bad=job.state == "failed") + gr.lines(job.said)
