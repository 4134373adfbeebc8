"""Serving the page: to this machine alone, or with a token to others; nothing is fetched from elsewhere."""

from __future__ import annotations

import atexit
import hmac
import ipaddress
import os
import shutil
import socket
import tempfile
from typing import Any, Final

from mixofshow.errors import SettingsError, shown
from mixofshow.studio import web as gr
from mixofshow.studio.compose import Studio
from mixofshow.studio.page import make_page
from mixofshow.studio.web import library, source
from mixofshow.studio.workspace import Workspace

HOST: Final = "127.0.0.1"
PORT: Final = 7860
SHORTEST_TOKEN: Final = 8
LARGEST_UPLOAD: Final = "1gb"
"""A LoRA of SDXL of rank 128 has 0.9 GB; pictures are refused by their reader from 64 MB on."""
LOCAL_NAMES: Final = ("127.0.0.1", "localhost")


def check_address(host: str, token: str | None) -> None:
    """Raise SettingsError for an address beyond this machine without a token, or with one that is soon guessed."""
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise SettingsError(f"token: expected at least {SHORTEST_TOKEN} characters, found {len(token)}")
    if token is None and not _is_local(host):
        raise SettingsError(
            f"host {shown(host)}: others could reach the studio there; give a token that they must know, or take {HOST}"
        )


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    workspace: Workspace, *, host: str = HOST, port: int = PORT, token: str | None = None
) -> tuple[Any, Studio, str]:
    """Open the workspace and serve it from now on, working in its folder; returns the page, what is behind it, its address.

    Only what pages show is served, which Gradio copies for them. Raises SettingsError, BaseModelError, ResourceError.
    """
    check_address(host, token)
    library()  # so that its lack is told before a model is loaded
    if "GRADIO_TEMP_DIR" not in os.environ:
        os.environ["GRADIO_TEMP_DIR"] = place = tempfile.mkdtemp(prefix="mixofshow-studio-")
        atexit.register(shutil.rmtree, place, ignore_errors=True)  # what was dropped, and copies of what was shown
    reach_without_proxy(host)
    check_port(host, port)
    studio = Studio.open(workspace)
    os.chdir(
        workspace.folder
    )  # from where Gradio may take what a page shows, and where the command lines are meant for
    page = make_page(studio)
    past_the_queue(page)
    _, address, _ = page.launch(**_launching(host, port, token))
    return page, studio, address


def past_the_queue(page: Any) -> None:
    """Answer what a page asks at once. What takes long is a job of ours, and Gradio's queue loses some of the rest: it
    forgets what a page has just asked when an earlier answer's connection is closed in that moment."""
    for event in page.fns.values():
        event.queue = False


def reach_without_proxy(host: str) -> None:
    """Ask this machine itself directly, for Gradio does so while it starts: a proxy leads elsewhere."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), *LOCAL_NAMES, host)))


def check_port(host: str, port: int) -> None:
    """Raise SettingsError for one that cannot be listened on, before a model is loaded."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise SettingsError(f"port {port} on {shown(host)}: {error.strerror or error}; give another port") from error


def _launching(host: str, port: int, token: str | None) -> dict[str, Any]:
    """Gradio's options: everything that would fetch, share, record or tell is off."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # A page elsewhere could otherwise reach this machine by a name of its own that leads here (DNS rebinding).
    called = "[" if ":" in host else host  # as it stands before the first colon in what a browser asks
    only_here = [Middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL_NAMES, called])] if token is None else []
    return {
        "server_name": host,
        "server_port": port,
        "auth": (lambda _, password: hmac.compare_digest(password.encode(), token.encode())) if token else None,
        "auth_message": "Any user name; the password is the token that the studio was started with." if token else None,
        "max_file_size": LARGEST_UPLOAD,
        "app_kwargs": {"middleware": only_here, "docs_url": None, "redoc_url": None, "openapi_url": None},
        "theme": _theme(),
        "css": source("page.css"),
        "share": False,
        "inbrowser": False,
        "prevent_thread_lock": True,
        "quiet": True,
        "footer_links": [],
        "run_history": False,
        "enable_monitoring": False,
        "pwa": False,
        "mcp_server": False,
        "ssr_mode": False,
        "strict_cors": True,
        # Else it asks itself whether it is there, and gives up where a busy machine takes three seconds to answer.
        "_frontend": False,
    }


def _theme() -> Any:
    """Gradio's plain one, with the fonts that are here, and colours that everybody can read."""
    plain = gr.themes.Default(
        primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    texts = dict.fromkeys(
        ("block_info_text_color", "block_title_text_color", "block_label_text_color"), "*body_text_color"
    )
    readable = {**texts, **{f"{name}_dark": value for name, value in texts.items()}}
    readable |= {"body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300"}
    readable |= {"input_placeholder_color": "*neutral_500", "input_placeholder_color_dark": "*neutral_400"}
    for mode in ("", "_dark"):
        readable |= {f"button_primary_background_fill{mode}": "*primary_700"}
        readable |= {f"button_primary_background_fill_hover{mode}": "*primary_800"}
    return plain.set(color_accent="*primary_700", **readable)
