"""The page: its tabs side by side, each with what it shows when the page is opened."""

from __future__ import annotations

from typing import Any

from mixofshow.studio import web as gr
from mixofshow.studio.compose import Studio
from mixofshow.studio.tab_compose import ComposeTab
from mixofshow.studio.tab_concepts import ConceptsTab
from mixofshow.studio.tab_measure import MeasureTab
from mixofshow.studio.tab_tune import TuneTab

TITLE = "mixofshow studio"


def make_page(studio: Studio) -> Any:
    """All of it, as Gradio's Blocks."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.HTML(f"<h1>{TITLE}</h1>", padding=False)
        with gr.Tabs():
            with gr.Tab("Compose", id="compose"):
                compose = ComposeTab(studio)
            with gr.Tab("Concepts", id="concepts"):
                ConceptsTab(studio)
            with gr.Tab("Tune", id="tune"):
                TuneTab(studio)
            with gr.Tab("Measure", id="measure"):
                MeasureTab(studio)
        page.load(compose.loaded, None, compose.at_first, show_progress="hidden", api_visibility="private")
    return page
