"""The page that a browser gets at /, and the headers under which nothing but the page itself runs in it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi.responses import HTMLResponse

from molora.assets import PAGE


def page_response(file: Path = PAGE) -> HTMLResponse:
    """The page, with a Content-Security-Policy that names its own style and script by their SHA-256.

    Raises:
        ValueError: a page that has not exactly one style element and one script element, both without attributes.
    """
    text = file.read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "style-src": _hash_of("style", text),
        "script-src": _hash_of("script", text),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",  # the page goes with the server that sent it
    }
    return HTMLResponse(text, headers=headers)


def _hash_of(element: str, text: str) -> str:
    found = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
    if len(found) != 1 or len(re.findall(rf"<{element}\b", text)) != 1:
        raise ValueError(f"the page must have one <{element}> without attributes, or its policy lets none run")
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()}'"
