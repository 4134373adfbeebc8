"""The third tab: pictures of something new, with captions and masks, and tuning on them."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from mixofshow.errors import DatasetError
from mixofshow.images import read_image
from mixofshow.studio import tuning
from mixofshow.studio import web as gr
from mixofshow.studio.compose import Studio
from mixofshow.studio.editor import blank, region_editor, shrunk
from mixofshow.studio.forms import component, table_of, values_of
from mixofshow.studio.jobs import outcome


class TuneTab:
    """The parts of the tab by name, and what happens between them."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.fields = tuning.tuning_fields(studio.workspace.base)
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=340):
                self._pictures()
            with gr.Column(scale=2, min_width=320):
                self._settings()
                self._run()
        self.seen, self.picture = gr.State(None), gr.State("")
        self._connect()

    def _pictures(self) -> None:
        self.known = gr.Dropdown([], label="Tuned or begun here before", value=None, elem_id="tune-known")
        with gr.Row():
            self.name = gr.Textbox(label="Name", info="Prompts call it <name>.", elem_id="tune-name", min_width=120)
            self.word = gr.Textbox(label="Class word", info="An ordinary word for what it is.", elem_id="tune-word", min_width=120)
        kinds = sorted({*tuning.SUFFIX_OF.values(), ".jpeg"})
        self.dropped = gr.File(
            label="Drop its pictures here", file_count="multiple", file_types=kinds, height=120, elem_id="tune-files"
        )
        self.gallery = gr.Gallery(
            label="Pictures: a click opens one to paint its mask",
            columns=6,
            height="auto",
            allow_preview=False,
            buttons=[],
            elem_id="tune-pictures",
        )
        table: dict[str, Any] = {"type": "array", "static_columns": [0], "column_count": 2, "wrap": True}
        self.captions = gr.Dataframe(headers=["picture", "caption"], label="Captions", elem_id="captions", **table)
        with gr.Row():
            self.save = gr.Button("Save the captions", elem_id="save-captions")
            self.check = gr.Button("Check", elem_id="check")
        self.said = gr.HTML(elem_id="tune-said")
        with gr.Accordion("Mask: paint over what the concept is", open=False) as self.masking:
            self.mask = region_editor(elem_id="mask-editor", tool="brush")
            self.keep_mask = gr.Button("Save the mask", elem_id="save-mask")
            self.mask_said = gr.HTML(elem_id="mask-said")

    def _settings(self) -> None:
        self.parts = []
        with gr.Accordion("Settings", open=False, elem_id="tune-settings"):
            for group, fields in groupby(self.fields, key=lambda one: one.group):
                if group:
                    with gr.Accordion(group.replace("_", " ").capitalize(), open=False):
                        self.parts += [component(one) for one in fields]
                else:
                    self.parts += [component(one) for one in fields]

    def _run(self) -> None:
        with gr.Row():
            self.start = gr.Button("Tune", variant="primary", elem_id="tune")
            self.stop = gr.Button("Stop and keep", elem_id="tune-stop")
            self.resume = gr.Button("Resume", elem_id="tune-resume")
        self.status = gr.HTML(elem_id="tune-status")
        self.curve = gr.HTML(elem_id="curve")
        self.line = gr.Gallery(
            label="Previews: its words only, at 0.7, and as tuned", columns=6, height="auto", buttons=[], elem_id="tune-previews"
        )
        self.command = gr.Textbox(label="Does the same", interactive=False, lines=2, buttons=["copy"], elem_id="tune-command")

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self.known.input(self.reopened, self.known, [self.name, self.word, *self.parts, *self._shown], **quiet)
        self.dropped.upload(self.brought, [self.name, self.dropped], [self.said, self.dropped, *self._shown], **quiet)
        self.save.click(self.saved, [self.name, self.captions], self.said, **quiet)
        self.check.click(self.checked, [self.name, self.word], self.said, show_progress="minimal", api_visibility="private")
        self.gallery.select(self.opened, self.name, [self.picture, self.mask, self.masking, self.mask_said], **quiet)
        self.keep_mask.click(self.masked, [self.name, self.picture, self.mask], self.mask_said, **quiet)
        how, begun = [self.name, self.word, *self.parts], [self.status, self.command]
        self.start.click(self.started, how, begun, api_name="tune", show_progress="hidden")
        self.resume.click(lambda *values: self.started(*values, resume=True), how, begun, **quiet)
        self.stop.click(lambda: self.studio.jobs.stop(tuning.KIND), **quiet)
        gr.Timer(1).tick(self.watched, self.seen, [self.seen, self.status, self.curve, self.line, self.known], **quiet)

    @property
    def _shown(self) -> list[Any]:
        return [self.gallery, self.captions]

    def reopened(self, name: str) -> list[Any]:
        """Everything that is known of a concept that was begun before."""

        def act() -> list[Any]:
            table = tuning.known(self.studio.workspace, name)
            values = values_of(self.fields, table)
            return [name, table.get("class_word", ""), *values, *self._pictures_of(name)]

        found, _, error = outcome(act)
        return [gr.skip()] * (4 + len(self.parts)) if error else found

    def _pictures_of(self, name: str) -> list[Any]:
        files = tuning.pictures(self.studio.workspace, name)
        return [[(str(file), file.name) for file in files], tuning.captions(self.studio.workspace, name)]

    def brought(self, name: str, uploads: list[str] | None) -> list[Any]:
        """Take pictures in; what cannot be read is said, a line each."""

        def act() -> list[Any]:
            said = tuning.add_pictures(self.studio.workspace, name or "", [Path(one) for one in uploads or []])
            return [gr.lines(said), None, *self._pictures_of(name)]

        found, _, error = outcome(act)
        return [gr.line(error, bad=True), gr.skip(), gr.skip(), gr.skip()] if error else found

    def saved(self, name: str, rows: list[list[Any]]) -> str:
        """Write the captions."""
        count, _, error = outcome(lambda: tuning.write_captions(self.studio.workspace, name or "", rows))
        return gr.line(error or f"{count} pictures have a caption", bad=bool(error))

    def checked(self, name: str, class_word: str) -> str:
        """What `check` says."""
        found, _, error = outcome(lambda: tuning.findings(self.studio.workspace, name or "", class_word or ""))
        return gr.line(error, bad=True) if error else gr.lines(found)

    def opened(self, name: str, event: gr.SelectData) -> list[Any]:
        """A picture under the brush."""

        def act() -> list[Any]:
            files = {file.name: file for file in tuning.pictures(self.studio.workspace, name or "")}
            picture = str((event.value or {}).get("caption", ""))
            image = read_image(files[picture], picture, error=DatasetError).image
            editor = gr.HTML(value=blank(image.size), picture=shrunk(image))
            return [picture, editor, gr.Accordion(open=True), gr.line(f"the mask of {picture}")]

        found, _, error = outcome(act)
        return [gr.skip(), gr.skip(), gr.skip(), gr.line(error, bad=True)] if error else found

    def masked(self, name: str, picture: str, value: Any) -> str:
        """Write the mask that was painted."""

        def act() -> str:
            return tuning.write_mask(self.studio.workspace, name or "", picture, value).name

        found, _, error = outcome(act)
        return gr.line(error or f"masks/{found} is written", bad=bool(error))

    def started(self, name: str, class_word: str, *values: Any, resume: bool = False) -> list[Any]:
        """Begin to tune; returns the line about it and the command that does the same."""

        def act() -> tuple[str, str]:
            given = table_of(self.fields, values)
            job = tuning.start_tuning(self.studio, name or "", class_word or "", given, resume=resume)
            return job.line, tuning.command(self.studio.workspace, name, resume=resume)

        found, _, error = outcome(act)
        return [gr.line(error, bad=True), gr.skip()] if error else [gr.line(found[0]), found[1]]

    def watched(self, seen: Any) -> list[Any]:
        """What has changed since this page looked last."""
        job, names = self.studio.jobs.latest(tuning.KIND), tuning.names(self.studio.workspace)
        grids = tuning.previews(self.studio.workspace, job.facts) if job and job.facts else []
        now = (job and (id(job), job.line, len(job.said)), grids, names)
        if now == seen:
            return [gr.skip()] * 5
        before: Any = seen or (None, [], [])
        return [
            now,
            gr.line(job.line, bad=job.state == "failed") + gr.lines(job.said) if job else "",
            tuning.curve(job.curve) if job else "",
            [(str(grid), f"step {int(grid.stem)}") for grid in grids] if grids != before[1] else gr.skip(),
            gr.Dropdown(choices=names) if names != before[2] else gr.skip(),
        ]
