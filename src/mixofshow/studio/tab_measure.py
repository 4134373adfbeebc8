"""The fourth tab: measuring what is on the shelf, and looking into a suite's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixofshow.evaluation.results import FOOTNOTE
from mixofshow.studio import measuring
from mixofshow.studio import web as gr
from mixofshow.studio.compose import Studio
from mixofshow.studio.jobs import Job, outcome
from mixofshow.studio.shelf import cards


class MeasureTab:
    """The parts of the tab by name, and what happens between them."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                self.word = gr.Dropdown([], label="Concept", elem_id="measured-word")
                label = "Pictures of it that it was not tuned on"
                self.dropped = gr.File(label=label, file_count="multiple", height=120, elem_id="held-out")
                self.said = gr.HTML(elem_id="held-out-said")
                self.images = gr.Number(value=1, precision=0, label="Pictures per prompt", elem_id="images")
                with gr.Row():
                    self.measure = gr.Button("Measure", variant="primary", elem_id="measure-start")
                    self.stop = gr.Button("Cancel", elem_id="measure-cancel")
                self.status = gr.HTML(elem_id="measure-status")
                self.command = gr.Textbox(label="Does the same", interactive=False, lines=2, elem_id="measure-command")
                label = "Or open a suite's results.json"
                self.opened = gr.File(label=label, file_types=[".json"], height=120, elem_id="results")
                label, many = "Or people's answers in a study", {"file_count": "multiple", "height": 120}
                self.answers = gr.File(label=label, file_types=[".json"], elem_id="answers", **many)
            with gr.Column(scale=3, min_width=340):
                empty: dict[str, Any] = {"headers": ["concept"], "interactive": False, "wrap": True}
                self.alignment = gr.Dataframe(label="Image alignment, single → fused", **empty)
                gr.HTML(gr.line(FOOTNOTE))
                self.matrix = gr.Dataframe(label="Who is taken for whom", **empty)
                self.preferred = gr.Dataframe(label="What people prefer", **empty)
                self.report = gr.DownloadButton("Report", interactive=False, elem_id="measure-report")
        self.seen = gr.State(None)
        self._connect()

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self.dropped.upload(self.brought, [self.word, self.dropped], [self.said, self.dropped], **quiet)
        self.measure.click(self.started, self.images, [self.status, self.command], **quiet)
        self.stop.click(lambda: self.studio.jobs.stop(measuring.KIND), **quiet)
        self.opened.upload(self.shown, self.opened, [self.alignment, self.matrix, self.status], **quiet)
        self.answers.upload(self.counted, self.answers, [self.preferred, self.status], **quiet)
        watched = [self.seen, self.word, self.status, self.alignment, self.matrix, self.report]
        gr.Timer(1).tick(self.watched, self.seen, watched, **quiet)

    def brought(self, word: str | None, uploads: list[str] | None) -> list[Any]:
        """Take held-out pictures in; what cannot be read is said."""
        files = [Path(one) for one in uploads or []]
        said, _, error = outcome(lambda: measuring.add_held_out(self.studio.workspace, word or "", files))
        return [gr.line(error, bad=True) if error else gr.lines(said or [f"{len(files)} pictures of {word}"]), None]

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
        return [gr.skip(), gr.skip(), gr.line(error, bad=True)] if error else [*map(_table, found), ""]

    def counted(self, paths: list[str]) -> list[Any]:
        """The table of what people answered."""
        found, _, error = outcome(lambda: measuring.preferences([Path(one) for one in paths]))
        return [gr.skip(), gr.line(error, bad=True)] if error else [_table(found), ""]

    def watched(self, seen: Any) -> list[Any]:
        """What has changed since this page looked last."""
        job, words = self.studio.jobs.latest(measuring.KIND), [card.word for card in cards(self.studio.workspace)]
        now = (job and (id(job), job.line), words)
        if now == seen:
            return [gr.skip()] * 6
        return [
            now,
            gr.skip() if seen and seen[1] == words else gr.Dropdown(choices=words),
            gr.line(job.line, bad=job.state == "failed") + gr.lines(job.said) if job else gr.skip(),
            *(self._results(job) if job and job.results else [gr.skip()] * 3),
        ]

    def _results(self, job: Job) -> list[Any]:
        results, report = job.results
        found, _, error = outcome(lambda: measuring.tables(measuring.results_in(results)))
        there = [gr.skip(), gr.skip()] if error else [*map(_table, found)]
        return [*there, gr.DownloadButton(value=str(report), interactive=True)]


def _table(table: measuring.Table) -> dict[str, Any]:
    """As a Dataframe takes it: texts, never HTML."""
    head, rows = table
    return {"headers": head, "data": rows}
