"""The app that Flower carries to clients: a name for functions of the package that the client has itself, and no code.

A SuperNode runs whatever app its center sends, beside the client's pictures, unless it is told whose signature to want
(`--trusted-entities`). Ours is signed by a key that was thrown away once it had signed: nobody can sign another one,
not even the center or whoever publishes this package. What runs at a client is the package that the client installed.
Made anew, when `CONTENT` changes, by `python -m mixofshow.federation.bundle`; in `signed/` are the app as Flower
bundles it, the key's public half, and the signature, as Flower keeps it (flwr 1.42, `supernode.start_client_internal`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from pathlib import Path
from typing import Any, Final

SIGNED: Final = Path(__file__).parent / "signed"
APP_ID: Final = "@mixofshow/federation"
KEY_ID: Final = "fpk_mixofshow"
TRUSTED: Final = SIGNED / "trusted.yaml"
"""Whose signature a client wants."""
CONTENT: Final = """\
[project]
name = "federation"
version = "1.0.0"
description = "Mix-of-Show between a center and its clients; both have mixofshow installed."

[tool.flwr.app]
publisher = "mixofshow"

[tool.flwr.app.components]
serverapp = "mixofshow.federation.server:app"
clientapp = "mixofshow.federation.client:app"

[tool.flwr.app.config]
round = ""
"""


def signed_app() -> tuple[bytes, dict[str, str]]:
    """The app, and who verified it, as Flower's SuperLink stores both."""
    return (SIGNED / "app.fab").read_bytes(), json.loads((SIGNED / "signature.json").read_text())


def built_app() -> bytes:
    """The app as Flower bundles it."""
    from flwr.cli.build import build_fab_from_files

    made: bytes = build_fab_from_files({"pyproject.toml": CONTENT.encode()})[0]
    return made


def sign(folder: Path = SIGNED) -> None:
    """Bundle the app and sign it with a new key, whose private half is never written and ends with this process."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from flwr.supercore.primitives.asymmetric_ed25519 import create_message_to_sign

    app, key, now = built_app(), ed25519.Ed25519PrivateKey.generate(), int(time.time())
    signature = key.sign(create_message_to_sign(hashlib.sha256(app).digest(), now))
    said: dict[str, Any] = {
        "signed_at": now,
        "signature": base64.urlsafe_b64encode(signature).decode(),
        "algorithm": "ed25519",
    }
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    folder.mkdir(exist_ok=True)
    (folder / "app.fab").write_bytes(app)
    (folder / TRUSTED.name).write_text(f"{KEY_ID}: {public.decode()}\n")
    verified = {KEY_ID: json.dumps(said), "valid_license": "Valid"}
    (folder / "signature.json").write_text(json.dumps(verified, indent=1) + "\n")


if __name__ == "__main__":
    sign()
