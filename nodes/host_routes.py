"""The pack's routes on the host's server, for the browser's side of it. All under /kontext, all JSON.

POST /kontext/plan     widgets of an edit            -> size, tokens, memory (`host_plan.plan_edit`)
POST /kontext/hints    {prompt}                      -> {hints}: what Kontext is known to misread in it
GET  /kontext/presets                                -> {presets}: names, labels, blanks
POST /kontext/prompt   {preset, values}              -> {prompt, hints}: a preset with its blanks filled
POST /kontext/there    {pictures}                    -> {there}: which pictures of the views the host still has
POST /kontext/whose    {prompt, client}              -> {mine, workflow, mark}: whether this client queued a run

Nothing is written, and a file is only named as in the loaders' lists. What does not fit is answered with 400 and
{error}, a mistake of ours with 500 and {error}, and its traceback is in the server's log.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import asdict, fields

from aiohttp import web

from ..kontext_core import geometry, prompts
from . import host, host_compare, host_plan, host_runs

logger = logging.getLogger("kontext")

MAX_BODY = 64 * 1024
MAX_TEXT = 16 * 1024
MAX_SIDE = 1 << 16
MAX_PICTURES = 16


def register() -> None:
    """Add the routes to the running server, once; nothing without a server."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None or getattr(server, "kontext_routes", False):
        return
    server.kontext_routes = True
    server.routes.post("/kontext/plan")(_answering(_plan))
    server.routes.post("/kontext/hints")(_answering(_hints))
    server.routes.get("/kontext/presets")(_answering(_presets))
    server.routes.post("/kontext/prompt")(_answering(_prompt))
    server.routes.post("/kontext/there")(_answering(_there))
    server.routes.post("/kontext/whose")(_answering(_whose))


def _answering(function):
    """A handler: the request's JSON object to `function` in a thread, its answer as JSON.

    ValueError is answered with 400, any other error logged and answered with 500; a cancelled request stays cancelled.
    """

    async def handle(request: web.Request) -> web.Response:
        try:
            body = await _body(request) if request.method == "POST" else {}
            return web.json_response(await asyncio.to_thread(function, body))
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)
        except Exception as error:
            logger.exception("%s failed", request.path)
            sentence = f"{request.path} failed with {type(error).__name__}: {error}; see ComfyUI's log"
            return web.json_response({"error": sentence}, status=500)

    return handle


async def _body(request: web.Request) -> dict:
    raw = b""
    async for chunk in request.content.iter_chunked(8192):
        raw += chunk
        if len(raw) > MAX_BODY:
            raise ValueError(f"the request is longer than {MAX_BODY} bytes")
    try:
        body = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"the request is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError(f"the request must be a JSON object, got {type(body).__name__}")
    return body


def text(body: dict, key: str, default: str = "") -> str:
    """A text of the request.

    Raises:
        ValueError: it is no text, or too long.
    """
    value = body.get(key, default)
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError(f"{key} must be a text of at most {MAX_TEXT} characters")
    return value


def number(body: dict, key: str, default: int, low: int, high: int) -> int:
    """A whole number of the request.

    Raises:
        ValueError: it is none, or outside low..high.
    """
    value = body.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{key} must be a whole number from {low} to {high}, got {str(value)[:40]}")
    return value


def choice(body: dict, key: str, default: str, allowed) -> str:
    """One of a few words.

    Raises:
        ValueError: it is none of them.
    """
    value = text(body, key, default)
    if value not in allowed:
        raise ValueError(f"{key} is {value[:40]!r}; choose one of {', '.join(allowed)}")
    return value


def _plan(body: dict) -> dict:
    known = {field.name for field in fields(host_plan.EditPlan)}
    unknown = sorted(set(body) - known)
    if unknown:
        raise ValueError(f"{unknown[0][:40]!r} is not known; a plan has {', '.join(sorted(known))}")
    sizes = body.get("pictures", [])
    if not isinstance(sizes, list) or len(sizes) > MAX_PICTURES:
        raise ValueError(f"pictures must be a list of at most {MAX_PICTURES} sizes")
    pictures = []
    for size in sizes:
        if not isinstance(size, list) or len(size) != 2:
            raise ValueError("each of pictures must be [width, height]")
        sides = {"width": size[0], "height": size[1]}
        pictures.append(tuple(number(sides, key, 0, 1, MAX_SIDE) for key in sides))
    plan = host_plan.EditPlan(
        pictures=tuple(pictures),
        fit=choice(body, "fit", "stretch", geometry.POLICIES),
        padding=text(body, "padding", "mirror"),
        width=number(body, "width", 0, 0, MAX_SIDE),
        height=number(body, "height", 0, 0, MAX_SIDE),
        batch_size=number(body, "batch_size", 1, 1, 4096),
        model=text(body, "model"),
        weight_dtype=choice(body, "weight_dtype", "default", host.DTYPES),
        vae=text(body, "vae"),
    )
    return host_plan.plan_edit(plan)


def _hints(body: dict) -> dict:
    return {"hints": [asdict(hint) for hint in prompts.check(text(body, "prompt"))]}


def _presets(_: dict) -> dict:
    return {"presets": [asdict(preset) for preset in prompts.PRESETS.values()]}


def _there(body: dict) -> dict:
    names = body.get("pictures", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("pictures must be a list of file names")
    return {"there": [name for name in names if host_compare.is_there(name)]}


def _whose(body: dict) -> dict:
    return host_runs.whose(text(body, "prompt"), text(body, "client"))


def _prompt(body: dict) -> dict:
    values = body.get("values", {})
    if not isinstance(values, dict):
        raise ValueError("values must be an object of texts")
    values = {key: text(values, key) for key in values}
    name = choice(body, "preset", "", prompts.PRESETS)
    prompt = prompts.build(name, **values)
    hints = [*prompts.check(prompt), *prompts.check_replacement(values.get("old", ""), values.get("new", ""))]
    return {"prompt": prompt, "hints": [asdict(hint) for hint in hints]}
