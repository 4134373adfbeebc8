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
from mixofshow.studio.editor import blank, picture_grid, region_editor, shrunk
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
        self.seen, self.picture, self.shown = gr.State(None), gr.State(""), gr.State("")
        self._connect()

    def _pictures(self) -> None:
        label, names = "Tuned or begun here before", tuning.names(self.studio.workspace)
        self.known = gr.Dropdown(names, label=label, value=None, visible=bool(names), elem_id="tune-known")
        with gr.Row():
            self.name = gr.Textbox(label="Name", info="Prompts call it <name>.", elem_id="tune-name", min_width=120)
            self.word = gr.Textbox(
                label="Class word", info="An ordinary word for what it is.", elem_id="tune-word", min_width=120
            )
        self.dropped = gr.File(
            label="Drop its pictures here",
            file_count="multiple",
            height=gr.ROOM,
            elem_id="tune-files",
        )
        self.said = gr.HTML(elem_id="tune-said")
        self.grid = picture_grid()
        self.check = gr.Button("Check", elem_id="check")
        self.checked_said = gr.HTML(elem_id="check-said")
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
            self.start = gr.Button("Tune", variant="primary", min_width=90, elem_id="tune")
            self.stop = gr.Button("Stop and keep", min_width=90, elem_id="tune-stop")
            self.resume = gr.Button("Resume", min_width=90, elem_id="tune-resume")
        self.left = gr.HTML(elem_id="tune-left")
        self.status = gr.HTML(elem_id="tune-status")
        self.curve = gr.HTML(elem_id="curve")
        self.line = gr.Gallery(
            label="Previews: its words only, at 0.7, and as tuned",
            columns=6,
            height="auto",
            buttons=[],
            elem_id="tune-previews",
        )
        self.command = gr.Textbox(
            label="Does the same", interactive=False, lines=2, buttons=["copy"], elem_id="tune-command"
        )

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        everything = [self.shown, self.name, self.word, *self.parts, self.grid, self.left, self.line, self.command]
        self.known.input(self.reopened, self.known, everything, **quiet)
        self.name.blur(self.named, [self.shown, self.name], everything, **quiet)
        asked, checks = [self.name, self.word], [self.grid, self.checked_said]
        brought = self.dropped.upload(
            self.brought, [self.name, self.dropped], [self.said, self.dropped, self.shown, self.grid], **quiet
        )
        self.check.click(self.checked, asked, checks, show_progress="minimal", api_visibility="private")
        # By default Gradio drops what comes while the same is still being answered.
        self.grid.caption(self.captioned, self.name, self.said, trigger_mode="multiple", **quiet)
        opened = self.grid.paint(self.opened, self.name, [self.picture, self.mask, self.masking, self.mask_said], **quiet)
        opened.then(None, js="() => document.querySelector('#mask-editor').scrollIntoView()", **quiet)
        away = self.grid.away(self.taken_away, self.name, [self.said, self.grid], trigger_mode="multiple", **quiet)
        painted = [self.name, self.picture, self.mask]
        masked = self.keep_mask.click(self.masked, painted, [self.mask_said, self.grid], **quiet)
        after: dict[str, Any] = {"trigger_mode": "always_last", **quiet}
        for done in (brought, away, masked):
            done.then(lambda *names: self.checked(*names) if names[0] else [gr.skip()] * 2, asked, checks, **after)
        how, begun = [self.name, self.word, *self.parts], [self.status, self.command, self.left]
        self.start.click(self.started, how, begun, api_name="tune", show_progress="hidden")
        self.resume.click(lambda *values: self.started(*values, resume=True), how, begun, **quiet)
        self.stop.click(lambda: self.studio.jobs.stop(tuning.KIND), **quiet)
        gr.Timer(1).tick(self.watched, self.seen, [self.seen, self.status, self.curve, self.line, self.known], **quiet)

    def named(self, shown: str, name: str | None) -> list[Any]:
        """What is known of a name that was typed, where it is another than the one shown."""
        known = name != shown and name in tuning.names(self.studio.workspace)
        return self.reopened(name or "") if known else [gr.skip()] * (7 + len(self.parts))

    def reopened(self, name: str) -> list[Any]:
        """Everything that is known of a concept that was begun before."""

        def act() -> list[Any]:
            workspace = self.studio.workspace
            table = tuning.known(workspace, name)
            values = values_of(self.fields, table)
            left = gr.line(tuning.broken_off(workspace, name))
            rest = [left, _steps(tuning.previews(workspace, name)), tuning.command(workspace, name) if table else ""]
            return [name, name, table.get("class_word", gr.skip()), *values, tuning.grid(workspace, name), *rest]

        found, _, error = outcome(act)
        unknown = [gr.skip()] * (4 + len(self.parts))
        return [*unknown, gr.line(error, bad=True), gr.skip(), gr.skip()] if error else found

    def brought(self, name: str, uploads: list[str] | None) -> list[Any]:
        """Take pictures in; what cannot be read is said, a line each."""

        def act() -> list[Any]:
            said = tuning.add_pictures(self.studio.workspace, name or "", [Path(one) for one in uploads or []])
            return [gr.lines(said), None, name, tuning.grid(self.studio.workspace, name)]

        found, _, error = outcome(act)
        return [gr.line(error, bad=True), None, gr.skip(), gr.skip()] if error else found

    def captioned(self, event: gr.EventData, name: str) -> str:
        """Write the caption that was typed."""
        row = [getattr(event, key, "") for key in ("name", "caption")]
        count, _, error = outcome(lambda: tuning.write_captions(self.studio.workspace, name or "", [row]))
        return gr.line(error or f"kept; {gr.many(count or 0, 'picture')} with a caption", bad=bool(error))

    def checked(self, name: str, class_word: str) -> list[Any]:
        """What `check` says, beside each picture, and of all of them."""

        def act() -> list[Any]:
            workspace = self.studio.workspace
            found = tuning.findings(workspace, name or "", class_word or "")
            return [tuning.grid(workspace, name, found), gr.lines(tuning.general(workspace, name, found))]

        found, _, error = outcome(act)
        return [gr.skip(), gr.line(error, bad=True)] if error else found

    def opened(self, event: gr.EventData, name: str) -> list[Any]:
        """A picture under the brush."""

        def act() -> list[Any]:
            file = tuning.picture_named(self.studio.workspace, name or "", str(getattr(event, "name", "")))
            image = read_image(file, file.name, error=DatasetError).image
            editor = gr.HTML(value=blank(image.size), picture=shrunk(image))
            return [file.name, editor, gr.Accordion(open=True), gr.line(f"the mask of {file.name}")]

        found, _, error = outcome(act)
        return [gr.skip(), gr.skip(), gr.Accordion(open=True), gr.line(error, bad=True)] if error else found

    def taken_away(self, event: gr.EventData, name: str) -> list[Any]:
        """Put a picture aside."""
        picture = str(getattr(event, "name", ""))

        def act() -> list[Any]:
            tuning.remove_picture(self.studio.workspace, name or "", picture)
            return [gr.line(f"{picture} is in the folder removed"), tuning.grid(self.studio.workspace, name)]

        found, _, error = outcome(act)
        return [gr.line(error, bad=True), gr.skip()] if error else found

    def masked(self, name: str, picture: str, value: Any) -> list[Any]:
        """Write the mask that was painted."""

        def act() -> list[Any]:
            file = tuning.write_mask(self.studio.workspace, name or "", picture, value)
            return [gr.line(f"masks/{file.name} is written"), tuning.grid(self.studio.workspace, name)]

        found, _, error = outcome(act)
        return [gr.line(error, bad=True), gr.skip()] if error else found

    def started(self, name: str, class_word: str, *values: Any, resume: bool = False) -> list[Any]:
        """Begin to tune; returns the line about it and the command that does the same."""

        def act() -> list[Any]:
            given = table_of(self.fields, values)
            job = tuning.start_tuning(self.studio, name or "", class_word or "", given, resume=resume)
            return [gr.line(job.line), tuning.command(self.studio.workspace, name, resume=resume), ""]

        found, _, error = outcome(act)
        return [gr.line(error, bad=True), gr.skip(), gr.skip()] if error else found

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
            _steps(grids) if grids != before[1] else gr.skip(),
            gr.Dropdown(choices=names, visible=bool(names)) if names != before[2] else gr.skip(),
        ]


def _steps(grids: list[Path]) -> list[tuple[str, str]]:
    """Preview grids as a gallery takes them."""
    return [(str(grid), f"step {int(grid.stem)}") for grid in grids]
