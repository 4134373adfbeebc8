"""The first tab: the canvas with its prompts, drawing, and the pictures that came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from mixofshow.sampling.settings import Composition
from mixofshow.studio import compose
from mixofshow.studio import web as gr
from mixofshow.studio.compose import Studio
from mixofshow.studio.drawing import OWN, shelf_of
from mixofshow.studio.editor import cards_for, region_editor
from mixofshow.studio.forms import component
from mixofshow.studio.jobs import Job, outcome

SHOWN: Final = 60
"""Pictures in the strip, at most."""
KIND: Final = "draw"


class ComposeTab:
    """The parts of the tab by name, and what happens between them."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=340):
                self.editor = region_editor()
                self.advice = gr.HTML(elem_id="compose-said")
            with gr.Column(scale=2, min_width=320):
                self._settings()
                self._drawing()
        self._pictures()
        self.seen, self.chosen = gr.State(None), gr.State("")
        self.parts = [self.editor, *self.plain, *self.more]
        self._connect()

    def _settings(self) -> None:
        prompt = gr.Textbox(label="Prompt", info="What the whole picture shows.", lines=2, elem_id="prompt")
        with gr.Row():
            self.scene = gr.Textbox(label="Scene", placeholder="in the forest", scale=2, elem_id="scene")
            self.fill = gr.Button("Write the prompts", scale=1, elem_id="fill")
        negative = gr.Textbox(label="Negative prompt", info="What it does not show.", elem_id="negative")
        with gr.Row():
            whole: dict[str, Any] = {"precision": 0, "min_width": 90}
            width = gr.Number(label="Width", elem_id="width", **whole)
            height = gr.Number(label="Height", elem_id="height", **whole)
            seed = gr.Number(label="Seed", elem_id="seed", **whole)
            num = gr.Number(label="Pictures", elem_id="num", **whole)
        self.plain = [prompt, negative, width, height, seed, num]
        with gr.Accordion("More settings", open=False, elem_id="more"):
            self.more = [component(one) for one in compose.more_fields()]
        self.drawn_by = gr.Dropdown([OWN], value=OWN, label="Drawn by", elem_id="drawn-by")

    def _drawing(self) -> None:
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw")
            self.compare = gr.Button("Compare", elem_id="compare")
            self.stop = gr.Button("Cancel", elem_id="cancel")
        self.status = gr.HTML(elem_id="draw-status")
        self.preview = gr.Image(label="As it forms", interactive=False, visible=False, elem_id="preview", buttons=[])

    def _pictures(self) -> None:
        title = "Side by side, on one seed: as composed, by other models, without regions"
        self.beside = gr.Gallery(label=title, columns=6, height="auto", buttons=[], visible=False, elem_id="beside")
        self.strip = gr.Gallery(
            label="Pictures: a click brings the composition back",
            columns=6,
            height="auto",
            allow_preview=False,
            object_fit="contain",
            elem_id="strip",
            buttons=[],
        )
        with gr.Row():
            label, copy = "Gives the same bytes, in the workspace's folder", {"buttons": ["copy"], "scale": 4}
            self.command = gr.Textbox(label=label, interactive=False, lines=2, elem_id="command", **copy)
            self.png = gr.DownloadButton("PNG", interactive=False, elem_id="png", min_width=80)
            self.yaml = gr.DownloadButton("YAML", interactive=False, elem_id="yaml", min_width=80)
        label = "Drop a picture of ours here: its composition comes back"
        self.dropped = gr.File(label=label, file_types=[".png"], height=120, elem_id="dropped")
        self.dropped_said = gr.HTML(elem_id="dropped-said")

    def _connect(self) -> None:
        everything = [*self.parts, self.drawn_by]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        changes = [self.editor.input, self.drawn_by.input, *(part.input for part in (*self.plain, *self.more))]
        gr.on(changes, self.edited, everything, [self.editor, self.advice], trigger_mode="always_last", **quiet)
        self.fill.click(self.filled, [*everything, self.scene], [*self.parts, self.advice], **quiet)
        self.draw.click(self.drawn, everything, self.status, api_name="draw", show_progress="hidden")
        self.compare.click(self.compared, everything, self.status, **quiet)
        self.stop.click(lambda: self.studio.jobs.stop(KIND), **quiet)
        back = [*self.parts, self.drawn_by, self.chosen, self.command, self.png, self.yaml, self.advice]
        self.strip.select(self.picked, None, back, **quiet)
        self.dropped.upload(self.brought, self.dropped, [*self.parts, self.advice, self.dropped_said], **quiet)
        watched = [self.seen, self.status, self.preview, self.strip, self.command, self.png, self.yaml, self.editor]
        gr.Timer(1).tick(self.watched, self.seen, [*watched, self.drawn_by, self.beside], **quiet)

    def loaded(self) -> list[Any]:
        """What a page shows that has just been opened: what the workspace holds."""
        studio = self.studio
        composition = studio.workspace.composition()
        value, *parts = compose.parts_of(studio, composition)
        cards, known = cards_for(shelf_of(studio.workspace, OWN)), [OWN, *studio.workspace.model_names()]
        lines = compose.lacking(studio, composition, OWN)
        return [gr.HTML(value=value, cards=cards, advice=lines), *parts, gr.Dropdown(choices=known, value=OWN)]

    def edited(self, *values: Any) -> list[Any]:
        """Keep what is on the canvas; say what is wrong with it, or what its regions lack."""
        canvas, drawn_by = values[0], values[-1]

        def act() -> tuple[Composition, list[str]]:
            composition = compose.composition_from(*values[:-1])
            return composition, compose.keep(self.studio, composition, drawn_by)

        done, said, error = outcome(act)
        if done is None:
            return [gr.skip(), gr.line(error, bad=True)]
        size = self.studio.size_of(done[0])
        same = size == (canvas.get("width"), canvas.get("height"))
        resized = {} if same else {"value": {**canvas, "width": size[0], "height": size[1]}}
        return [gr.HTML(advice=done[1], **resized), gr.lines(said)]

    def filled(self, *values: Any) -> list[Any]:
        """Prompts for all boxes that name a concept."""

        def act() -> Composition:
            given = compose.composition_from(*values[:-2])
            return compose.with_prompts(self.studio, given, values[-2], values[-1] or "")

        return self._back(act, values[-2])

    def drawn(self, *values: Any) -> str:
        """Begin to draw; returns the line about it."""
        return self._begun(compose.start_drawing, values)

    def compared(self, *values: Any) -> str:
        """Begin to draw it in every way; returns the line about it."""
        return self._begun(compose.start_comparing, values)

    def _begun(self, start: Callable[[Studio, Composition, str], Job], values: Sequence[Any]) -> str:
        def act() -> str:
            composition = compose.composition_from(*values[:-1])
            compose.keep(self.studio, composition, values[-1])
            return start(self.studio, composition, values[-1]).line

        line, _, error = outcome(act)
        return gr.line(error or line, bad=bool(error))

    def picked(self, event: gr.SelectData) -> list[Any]:
        """The composition of the picture in the strip that was clicked."""
        stem = str((event.value or {}).get("caption", "")).partition(" ")[0]
        found, _, error = outcome(lambda: compose.picture_named(self.studio, stem))
        if error:
            return [*(gr.skip() for _ in self.parts), *(gr.skip() for _ in range(5)), gr.line(error, bad=True)]
        drawn_by = compose.drawn_by_of(found)
        *parts, said = self._back(lambda: compose.recalled(found), drawn_by, found)
        return [*parts, drawn_by, stem, *_files(found), said]

    def brought(self, path: str) -> list[Any]:
        """The composition of a picture from elsewhere."""
        *parts, said = self._back(lambda: compose.recalled(Path(path)), OWN)
        return [*parts, "", said]

    def _back(self, act: Callable[[], Composition], drawn_by: str, picture: Path | None = None) -> list[Any]:
        """All parts as a composition says, and an empty line; or none of them, and what is wrong."""

        def parts() -> list[Any]:
            composition = act()
            lines = compose.keep(self.studio, composition, drawn_by)
            value, *others = compose.parts_of(self.studio, composition)
            return [gr.HTML(value=value, advice=lines, picture=compose.underlay(picture)), *others]

        found, said, error = outcome(parts)
        if error:
            return [*(gr.skip() for _ in self.parts), gr.line(error, bad=True)]
        return [*found, gr.lines(said)]

    def watched(self, seen: Any) -> list[Any]:
        """What has changed since this page looked last."""
        job, files = self.studio.jobs.latest(KIND), self.studio.workspace.picture_files()[:SHOWN]
        shelf, models = shelf_of(self.studio.workspace, OWN), self.studio.workspace.model_names()
        now = (job and (id(job), job.line, id(job.preview)), [file.name for file in files], shelf, models)
        if now == seen:
            return [gr.skip()] * 10
        before: Any = seen or (None, [], [], [])
        finished = [one for one in files if one.name not in before[1]]
        newest = finished[0] if finished and seen is not None else None
        running = job is not None and not job.over
        under: dict[str, Any] = {"picture": compose.underlay(newest)} if newest else {}
        under |= {"cards": cards_for(shelf)} if shelf != before[2] else {}
        return [
            now,
            gr.line(job.line, bad=job.state == "failed") + gr.lines(job.said) if job else "",
            gr.Image(value=job.preview, visible=running and job.preview is not None) if job else gr.skip(),
            [(str(file), compose.caption(file)) for file in files] if finished else gr.skip(),
            *(_files(newest) if newest else [gr.skip()] * 3),
            gr.HTML(**under) if under else gr.skip(),
            gr.Dropdown(choices=[OWN, *models]) if models != before[3] else gr.skip(),
            _side_by_side(job) if job and job.facts else gr.Gallery(visible=False),
        ]


def _side_by_side(job: Job) -> Any:
    """What a comparison has drawn so far, each with the way in which it was."""
    there = [(str(file), label) for file, label in job.facts if file in job.results]
    return gr.Gallery(value=there, visible=bool(there))


def _files(picture: Path) -> list[Any]:
    """The command line, and both files to take along."""
    composition = picture.with_suffix(".yaml")
    there = composition.is_file()
    return [
        compose.command_of(picture),
        gr.DownloadButton(value=str(picture), interactive=True),
        gr.DownloadButton(value=str(composition) if there else None, interactive=there),
    ]
