"""The fourth tab: measuring what is on the shelf, and looking into a suite's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from mixofshow.evaluation.results import FOOTNOTE
from mixofshow.studio import measuring
from mixofshow.studio import web as gr
from mixofshow.studio.compose import Studio
from mixofshow.studio.jobs import outcome
from mixofshow.studio.shelf import cards
from mixofshow.studio.workspace import changed_at

COMMAND: Final = {"interactive": False, "lines": 2, "buttons": ["copy"]}


class MeasureTab:
    """The parts of the tab by name, and what happens between them."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                self.word = gr.Dropdown([], label="Concept", elem_id="measured-word")
                label = "Pictures of it that it was not tuned on"
                self.dropped = gr.File(label=label, file_count="multiple", height=gr.ROOM, elem_id="held-out")
                self.said = gr.HTML(elem_id="held-out-said")
                self.images = gr.Number(value=1, precision=0, label="Pictures per prompt", elem_id="images")
                with gr.Row():
                    self.measure = gr.Button("Measure", variant="primary", elem_id="measure-start")
                    self.stop = gr.Button("Cancel", elem_id="measure-cancel")
                self.status = gr.HTML(elem_id="measure-status")
                self.command = gr.Textbox(label="Does the same", **COMMAND, elem_id="measure-command")
                label = "Or open a suite's results.json"
                self.opened = gr.File(label=label, height=gr.ROOM, elem_id="results")
                self.opened_said = gr.HTML(elem_id="results-said")
                self._asking()
            with gr.Column(scale=3, min_width=340):
                self._found()
        self.seen = gr.State(None)
        self._connect()

    def _asking(self) -> None:
        with gr.Accordion("Ask people which pictures they prefer", open=False, elem_id="asking"):
            self.count = gr.Number(value=4, precision=0, label="Pairs of pictures to ask about", elem_id="study-count")
            with gr.Row():
                self.make = gr.Button("Make the page", min_width=90, elem_id="study-make")
                self.study = gr.DownloadButton("Take it along", interactive=False, min_width=90, elem_id="study-file")
            self.study_command = gr.Textbox(label="Does the same", **COMMAND, elem_id="study-command")
            label, many = "Their answers, a file of each person", {"file_count": "multiple", "height": gr.ROOM}
            self.answers = gr.File(label=label, elem_id="answers", **many)
        self.study_said = gr.HTML(elem_id="study-said")

    def _found(self) -> None:
        empty: dict[str, Any] = {"headers": ["concept"], "interactive": False, "wrap": True, "visible": False}
        self.nothing = gr.HTML(gr.line("What is measured or opened is shown here."))
        self.alignment = gr.Dataframe(label="Image alignment, single → fused", **empty)
        self.note = gr.HTML(gr.line(FOOTNOTE), visible=False)
        self.matrix = gr.Dataframe(label="Who is taken for whom", **empty)
        self.preferred = gr.Dataframe(label="What people prefer", **empty)
        with gr.Row():
            self.report = gr.DownloadButton("Report", interactive=False, min_width=90, elem_id="measure-report")
            self.show = gr.Button("Show the report", min_width=90, elem_id="measure-show")
            self.answer = gr.Button("Answer the study here", min_width=90, elem_id="study-answer")
        self.page = gr.HTML(elem_id="measure-page")
        self.page_said = gr.HTML(elem_id="measure-page-said")

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self.dropped.upload(self.brought, [self.word, self.dropped], [self.said, self.dropped], **quiet)
        self.measure.click(self.started, self.images, [self.status, self.command], **quiet)
        self.stop.click(lambda: self.studio.jobs.stop(measuring.KIND), **quiet)
        tables = [self.alignment, self.matrix, self.note, self.nothing]
        self.opened.upload(self.shown, self.opened, [*tables, self.opened_said], **quiet)
        self.answers.upload(self.counted, self.answers, [self.preferred, self.nothing, self.study_said], **quiet)
        self.make.click(self.made, self.count, [self.study_said, self.study_command, self.study], **quiet)
        pages = [self.page, self.page_said]
        self.show.click(
            lambda: self.inside(measuring.report_folder(self.studio.workspace) / "report.html"), None, pages, **quiet
        )
        self.answer.click(
            lambda: self.inside(measuring.study_page(self.studio.workspace), answering=True), None, pages, **quiet
        )
        watched = [self.seen, self.word, self.status, *tables, self.report]
        gr.Timer(1).tick(self.watched, self.seen, watched, **quiet)

    def brought(self, word: str | None, uploads: list[str] | None) -> list[Any]:
        """Take held-out pictures in; what cannot be read is said."""
        files = [Path(one) for one in uploads or []]
        said, _, error = outcome(lambda: measuring.add_held_out(self.studio.workspace, word or "", files))
        return [
            gr.line(error, bad=True) if error else gr.lines(said or [f"{gr.many(len(files), 'picture')} of {word}"]),
            None,
        ]

    def started(self, images: int | None) -> list[Any]:
        """Begin to measure; returns the line about it and the command that does the same."""

        def act() -> tuple[str, str]:
            count = 1 if images is None else images
            job = measuring.start_measuring(self.studio, count)
            return job.line, measuring.command(self.studio.workspace, count)

        found, _, error = outcome(act)
        return [gr.line(error, bad=True), gr.skip()] if error else [gr.line(found[0]), found[1]]

    def shown(self, path: str) -> list[Any]:
        """The tables of results from elsewhere."""
        found, _, error = outcome(lambda: measuring.tables(measuring.results_in(Path(path))))
        return [*[gr.skip()] * 4, gr.line(error, bad=True)] if error else [*_tables(found), ""]

    def counted(self, paths: list[str]) -> list[Any]:
        """The table of what people answered."""
        found, _, error = outcome(lambda: measuring.preferences([Path(one) for one in paths]))
        return (
            [gr.skip(), gr.skip(), gr.line(error, bad=True)] if error else [_table(found), gr.HTML(visible=False), ""]
        )

    def made(self, count: int | None) -> list[Any]:
        """A page to ask people with."""
        workspace, asked = self.studio.workspace, count or 0
        found, _, error = outcome(lambda: measuring.make_study(workspace, asked))
        if error:
            return [gr.line(error, bad=True), gr.skip(), gr.skip()]
        page = gr.DownloadButton(value=str(measuring.study_page(workspace)), interactive=True)
        return [
            gr.line(f"a page with {gr.many(found, 'pair')} of pictures"),
            measuring.study_command(workspace, asked),
            page,
        ]

    def inside(self, page: Path, *, answering: bool = False) -> list[str]:
        """A page of the workspace, within this one."""
        found, _, error = outcome(lambda: measuring.inside(page, answering=answering))
        missing = f"{page.name} is not there yet, or too large to be shown here"
        return [found or "", "" if found else gr.line(error or missing, bad=True)]

    def watched(self, seen: Any) -> list[Any]:
        """What has changed since this page looked last."""
        job, words = self.studio.jobs.latest(measuring.KIND), [card.word for card in cards(self.studio.workspace)]
        measured = changed_at(measuring.report_folder(self.studio.workspace) / "report.html")
        now = (job and (id(job), job.line), words, measured)
        if now == seen:
            return [gr.skip()] * 8
        before: Any = seen or (None, [], 0)
        return [
            now,
            gr.skip() if before[1] == words else gr.Dropdown(choices=words),
            gr.line(job.line, bad=job.state == "failed") + gr.lines(job.said) if job else gr.skip(),
            *([gr.skip()] * 5 if before[2] == measured else self._results()),
        ]

    def _results(self) -> list[Any]:
        """The tables and the report of what was measured last, by this studio, one before, or the command line."""
        folder = measuring.report_folder(self.studio.workspace)
        found, _, error = outcome(lambda: measuring.tables(measuring.results_in(folder / "results.json")))
        there = [gr.skip()] * 4 if error else _tables(found)
        return [*there, gr.DownloadButton(value=str(folder / "report.html"), interactive=True)]


def _tables(found: tuple[measuring.Table, measuring.Table]) -> list[Any]:
    """Both tables and the note below the first, in the place of the line that says that there are none."""
    return [*map(_table, found), gr.HTML(visible=True), gr.HTML(visible=False)]


def _table(table: measuring.Table) -> Any:
    """As a Dataframe takes it: texts, never HTML."""
    head, rows = table
    return gr.Dataframe(value={"headers": head, "data": rows}, visible=True)
