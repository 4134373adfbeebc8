"""The first tab: the canvas with its prompts, drawing, and the pictures that came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image

from mixofshow.sampling.pictures import embedded
from mixofshow.sampling.settings import Composition
from mixofshow.studio import compose, sketching
from mixofshow.studio import web as gr
from mixofshow.studio.comparing import start_comparing
from mixofshow.studio.compose import Studio
from mixofshow.studio.drawing import OWN, shelf_of
from mixofshow.studio.editor import blank, cards_for, painted, region_editor
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
                self.editor = region_editor(composes=True)
                self.advice = gr.HTML(elem_id="compose-said")
                self._given()
            with gr.Column(scale=2, min_width=320):
                self._prompts()
                self._drawing()
                self._settings()
        self._pictures()
        self.seen, self.chosen, self.given = gr.State(None), gr.State(""), gr.State({})
        self.parts = [self.editor, *self.plain, *self.more, self.given]
        self.everything = [*self.parts, self.drawn_by]
        self._connect()
        self._connect_given()

    def _given(self) -> None:
        networks = sketching.networks(self.studio.workspace)
        with gr.Accordion("Start from a picture, follow a sketch", open=False, elem_id="given"):
            self.start = gr.File(label="A picture to start from", height=gr.ROOM, elem_id="start")
            self.pad = region_editor(elem_id="sketch", tool="brush")
            with gr.Row():
                self.network = gr.Dropdown(
                    networks, value=next(iter(networks), None), label="Followed by", min_width=220, elem_id="network"
                )
                names = ("Strength", "From (share)", "To (share)")
                self.extent = [
                    gr.Number(value, label=name, min_width=90) for name, value in zip(names, (1, 0, 1), strict=True)
                ]
            self.follow = gr.Button("Follow what is painted", elem_id="follow")
            label = "Or follow a picture"
            self.sketch = gr.File(label=label, height=gr.ROOM, elem_id="sketch-file")
        self.given_said = gr.HTML(elem_id="given-said")
        self.without = gr.Button("Draw without these", visible=False, elem_id="without")

    def _prompts(self) -> None:
        self.prompt = gr.Textbox(label="Prompt", info="What the whole picture shows.", lines=2, elem_id="prompt")
        with gr.Row():
            self.scene = gr.Textbox(label="Scene", placeholder="in the forest", scale=2, elem_id="scene")
            self.fill = gr.Button("Write the prompts", scale=1, elem_id="fill")

    def _settings(self) -> None:
        negative = gr.Textbox(label="Negative prompt", info="What it does not show.", elem_id="negative")
        with gr.Row():
            whole: dict[str, Any] = {"precision": 0, "min_width": 90}
            width = gr.Number(label="Width", elem_id="width", **whole)
            height = gr.Number(label="Height", elem_id="height", **whole)
            seed = gr.Number(label="Seed", elem_id="seed", **whole)
            num = gr.Number(label="Pictures", elem_id="num", **whole)
        self.plain = [self.prompt, negative, width, height, seed, num]
        with gr.Accordion("More settings", open=False, elem_id="more"):
            self.more = [component(one) for one in compose.more_fields()]
        self.settings_said = gr.HTML(elem_id="settings-said")
        self.drawn_by = gr.Dropdown([OWN], value=OWN, label="Drawn by", elem_id="drawn-by")

    def _drawing(self) -> None:
        with gr.Row():
            narrow: dict[str, Any] = {"min_width": 90}
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw", **narrow)
            self.compare = gr.Button("Compare", elem_id="compare", **narrow)
            self.stop = gr.Button("Cancel", elem_id="cancel", **narrow)
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
        self.strip_said = gr.HTML(elem_id="strip-said")
        with gr.Row():
            label, copy = "Gives the same bytes, in the workspace's folder", {"buttons": ["copy"], "scale": 4}
            self.command = gr.Textbox(label=label, interactive=False, lines=2, elem_id="command", **copy)
            self.png = gr.DownloadButton("PNG", interactive=False, elem_id="png", min_width=80)
            self.yaml = gr.DownloadButton("YAML", interactive=False, elem_id="yaml", min_width=80)
        label = "Drop a picture of ours here: its composition comes back"
        self.dropped = gr.File(label=label, height=gr.ROOM, elem_id="dropped")
        self.dropped_said = gr.HTML(elem_id="dropped-said")

    def _connect(self) -> None:
        everything, given = self.everything, [self.given_said, self.without]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        parts = [*self.plain, *self.more]
        changes = [self.editor.input, self.drawn_by.input, *(part.input for part in parts)]
        # Gradio swallows the first input after a value of ours, which is all there is when people paste.
        changes += [part.blur for part in parts if isinstance(part, gr.Textbox)]
        resized = [self.editor, self.pad, self.advice, self.settings_said]
        gr.on(changes, self.edited, everything, resized, trigger_mode="always_last", **quiet)
        self.fill.click(self.filled, [*everything, self.scene], [*self.parts, *given, self.advice], **quiet)
        self.draw.click(self.drawn, everything, self.status, api_name="draw", show_progress="hidden")
        self.compare.click(self.compared, everything, self.status, **quiet)
        self.editor.draw_over(self.drawn_over, [*everything, self.chosen], self.status, **quiet)
        self.stop.click(lambda: self.studio.jobs.stop(KIND), **quiet)
        files = [self.chosen, self.command, self.png, self.yaml]
        self.strip.select(self.picked, None, [*self.parts, *given, self.strip_said, self.drawn_by, *files], **quiet)
        back = [*self.parts, *given, self.chosen, self.dropped_said]
        self.dropped.upload(self.brought, self.dropped, back, **quiet)
        watched = [self.seen, self.status, self.preview, self.strip, *files, self.editor, self.drawn_by, self.beside]
        gr.Timer(1).tick(self.watched, self.seen, watched, **quiet)
        gr.Timer(1).tick(self.caught_up, self.drawn_by, [*self.parts, *given, self.advice], **quiet)

    def _connect_given(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        changed = [self.given, self.given_said, self.without, self.editor]
        self.start.upload(self.started_from, [*self.everything, self.start], changed, **quiet)
        how = [*self.everything, self.network, *self.extent]
        self.follow.click(self.painted, [*how, self.pad], changed, **quiet)
        self.sketch.upload(self.followed, [*how, self.sketch], changed, **quiet)
        self.without.click(self.drawn_without, self.everything, changed, **quiet)

    def loaded(self, request: gr.Request) -> list[Any]:
        """What a page shows that has just been opened: what the workspace holds."""
        studio = self.studio
        studio.changes.begin(request.session_hash or "")
        composition = studio.workspace.composition()
        value, *parts = compose.parts_of(studio, composition)
        cards, known = cards_for(shelf_of(studio.workspace, OWN)), [OWN, *studio.workspace.model_names()]
        canvas = {"value": value, "cards": cards, "picture": compose.underlay(None, composition)}
        lines, pad = compose.lacking(studio, composition, OWN), gr.HTML(value=blank(studio.size_of(composition)))
        drawn_by = gr.Dropdown(choices=known, value=OWN)
        return [gr.HTML(**canvas, advice=lines), *parts, drawn_by, pad, *_told(parts[-1])]

    @property
    def at_first(self) -> list[Any]:
        """What `loaded` fills."""
        return [*self.everything, self.pad, self.given_said, self.without]

    def edited(self, request: gr.Request, *values: Any) -> list[Any]:
        """Keep what is on the canvas; say what is wrong with it, or what its regions lack."""
        canvas, drawn_by = values[0], values[-1]

        def act() -> tuple[Composition, list[str]]:
            composition = compose.composition_from(*values[:-1])
            return composition, self._keep(request, composition, drawn_by)

        done, said, error = outcome(act)
        if done is None:  # said beside the regions, or else beside the settings
            wrong = gr.line(error, bad=True)
            return [gr.skip(), gr.skip(), *((wrong, "") if "region" in error else ("", wrong))]
        size = self.studio.size_of(done[0])
        if size == (canvas.get("width"), canvas.get("height")):
            return [gr.HTML(advice=done[1]), gr.skip(), gr.lines(said), ""]
        resized = {**canvas, "width": size[0], "height": size[1]}
        return [gr.HTML(advice=done[1], value=resized), gr.HTML(value=blank(size)), gr.lines(said), ""]

    def _keep(self, request: gr.Request, composition: Composition, drawn_by: str) -> list[str]:
        """What is on the canvas now, by this page; what its regions lack."""
        return compose.keep(self.studio, composition, drawn_by, request.session_hash or "")

    def filled(self, request: gr.Request, *values: Any) -> list[Any]:
        """Prompts for all boxes that name a concept."""

        def act() -> Composition:
            given = compose.composition_from(*values[:-2])
            return compose.with_prompts(self.studio, given, values[-2], values[-1] or "")

        return self._back(request, act, values[-2])

    def drawn(self, request: gr.Request, *values: Any) -> str:
        """Begin to draw; returns the line about it."""
        return self._begun(request, compose.start_drawing, values)

    def compared(self, request: gr.Request, *values: Any) -> str:
        """Begin to draw it in every way; returns the line about it."""
        return self._begun(request, start_comparing, values)

    def drawn_over(self, request: gr.Request, event: gr.EventData, *values: Any) -> str:
        """Begin to draw a region over, in the picture that was clicked last; returns the line about it."""
        *parts, picture = values

        def start(studio: Studio, composition: Composition, drawn_by: str) -> Job:
            return compose.start_drawing_over(studio, picture, getattr(event, "region", 0), composition, drawn_by)

        return self._begun(request, start, parts)

    def started_from(self, request: gr.Request, *values: Any) -> list[Any]:
        """The picture that was dropped to start from."""
        *parts, path = values
        return self._changed(request, parts, lambda _: {"image": embedded(sketching.uploaded(Path(path)))})

    def painted(self, request: gr.Request, *values: Any) -> list[Any]:
        """The sketch that was painted is followed, in white on black."""
        *rest, pad = values
        return self._followed(request, rest, lambda size: painted(pad, size).convert("RGB"))

    def followed(self, request: gr.Request, *values: Any) -> list[Any]:
        """The picture that was dropped is followed."""
        *rest, path = values
        return self._followed(request, rest, lambda _: sketching.uploaded(Path(path)))

    def _followed(
        self, request: gr.Request, values: Sequence[Any], picture: Callable[[tuple[int, int]], Image.Image]
    ) -> list[Any]:
        *parts, network, strength, start, end = values

        def act(composition: Composition) -> dict[str, Any]:
            how = {"strength": strength, "start": start, "end": end}
            sketch = picture(self.studio.size_of(composition))
            return {"controls": [sketching.following(self.studio.workspace, sketch, network or "", **how)]}

        return self._changed(request, parts, act)

    def drawn_without(self, request: gr.Request, *values: Any) -> list[Any]:
        """Nothing to start from or to follow any more."""
        return self._changed(request, [*values[:-2], {}, values[-1]], lambda _: {})

    def _changed(
        self, request: gr.Request, values: Sequence[Any], act: Callable[[Composition], dict[str, Any]]
    ) -> list[Any]:
        """What a composition is drawn from, with what the action adds; kept with what is on the canvas."""
        *parts, given, drawn_by = values

        def changed() -> Composition:
            before = {} if "redo" in given else {key: given[key] for key in ("image", "controls") if key in given}
            found = before | act(compose.composition_from(*parts, before))
            composition = compose.composition_from(*parts, found)
            self._keep(request, composition, drawn_by)
            return composition

        found, _, error = outcome(changed)
        if error:
            return [gr.skip(), gr.line(error, bad=True), gr.skip(), gr.skip()]
        now = compose.given_of(found)
        return [now, *_told(now), gr.HTML(picture=compose.underlay(None, found))]

    def _begun(
        self, request: gr.Request, start: Callable[[Studio, Composition, str], Job], values: Sequence[Any]
    ) -> str:
        def act() -> str:
            composition = compose.composition_from(*values[:-1])
            self._keep(request, composition, values[-1])
            return start(self.studio, composition, values[-1]).line

        line, _, error = outcome(act)
        return gr.line(error or line, bad=bool(error))

    def picked(self, request: gr.Request, event: gr.SelectData) -> list[Any]:
        """The composition of the picture in the strip that was clicked."""
        text = str((event.value or {}).get("caption", ""))
        found, _, error = outcome(lambda: compose.picture_captioned(self.studio, text))
        if error:
            return [*self._unchanged(error), *[gr.skip()] * 5]
        drawn_by = compose.drawn_by_of(found)
        back = self._back(request, lambda: compose.recalled(self.studio.workspace, found), drawn_by, found)
        return [*back, drawn_by, *_files(found)]

    def brought(self, request: gr.Request, path: str) -> list[Any]:
        """The composition of a picture from elsewhere."""
        *back, said = self._back(request, lambda: compose.recalled(self.studio.workspace, Path(path)), OWN)
        return [*back, "", said]

    def _back(
        self, request: gr.Request, act: Callable[[], Composition], drawn_by: str, picture: Path | None = None
    ) -> list[Any]:
        """All parts as a composition says, what it is drawn from, and an empty line; or none of them, and what is wrong."""

        def parts() -> list[Any]:
            composition = act()
            lines = self._keep(request, composition, drawn_by)
            value, *others = compose.parts_of(self.studio, composition)
            under = compose.underlay(picture, composition)
            return [gr.HTML(value=value, advice=lines, picture=under), *others, *_told(others[-1])]

        found, said, error = outcome(parts)
        return self._unchanged(error) if error else [*found, gr.lines(said)]

    def _unchanged(self, error: str) -> list[Any]:
        return [*(gr.skip() for _ in self.parts), gr.skip(), gr.skip(), gr.line(error, bad=True)]

    def caught_up(self, request: gr.Request, drawn_by: str) -> list[Any]:
        """What another page has put on the canvas since this one looked last."""
        news = self.studio.changes.news(request.session_hash or "")
        if not news:
            return [gr.skip()] * (len(self.parts) + 3)
        composition = self.studio.workspace.composition()
        value, *others = compose.parts_of(self.studio, composition)
        editor = gr.HTML(value=value, advice=compose.lacking(self.studio, composition, drawn_by))
        return [editor, *others, *_told(others[-1]), gr.line(news)]

    def watched(self, seen: Any) -> list[Any]:
        """What has changed since this page looked last."""
        job: Any = self.studio.jobs.latest(KIND)
        files = self.studio.workspace.picture_files()[:SHOWN]
        shelf, models = shelf_of(self.studio.workspace, OWN), self.studio.workspace.model_names()
        waiting = self.studio.jobs.waiting(KIND) - (job is not None and job.state == "waiting")
        now = (job and (id(job), job.line, id(job.preview), waiting), [file.name for file in files], shelf, models)
        if now == seen:
            return [gr.skip()] * 11
        before: Any = seen or (None, [], [], [])
        finished = [one for one in files if one.name not in before[1]]
        newest = finished[0] if finished and seen is not None else None
        running = job is not None and not job.over
        under: dict[str, Any] = {"picture": compose.underlay(newest)} if newest else {}
        under |= {"cards": cards_for(shelf)} if shelf != before[2] else {}
        return [
            now,
            _line_of(job, now[0][-1]) if job else "",
            gr.Image(value=job.preview, visible=running and job.preview is not None) if job else gr.skip(),
            [(str(file), compose.caption(file)) for file in files] if finished else gr.skip(),
            *(_files(newest) if newest else [gr.skip()] * 4),
            gr.HTML(**under) if under else gr.skip(),
            gr.Dropdown(choices=[OWN, *models]) if models != before[3] else gr.skip(),
            _side_by_side(job) if job and job.facts else gr.Gallery(visible=False),
        ]


def _line_of(job: Job, waiting: int) -> str:
    """Where it stands, and how many wait behind it."""
    more = [f"{waiting} more of them {'wait' if waiting > 1 else 'waits'} behind it"] if waiting else []
    return gr.line(job.line, bad=job.state == "failed") + gr.lines([*more, *job.said])


def _side_by_side(job: Job) -> Any:
    """What a comparison has drawn so far, each with the way in which it was."""
    there = [(str(file), label) for file, label in job.facts if file in job.results]
    return gr.Gallery(value=there, visible=bool(there))


def _told(given: dict[str, Any]) -> list[Any]:
    """What a composition is drawn from, in words, and the button that takes it away."""
    return [gr.lines(sketching.in_words(given)), gr.Button(visible=bool(given))]


def _files(picture: Path) -> list[Any]:
    """A picture's name, the command line, and both files to take along."""
    composition = picture.with_suffix(".yaml")
    there = composition.is_file()
    return [
        picture.stem,
        compose.command_of(picture),
        gr.DownloadButton(value=str(picture), interactive=True),
        gr.DownloadButton(value=str(composition) if there else None, interactive=there),
    ]
