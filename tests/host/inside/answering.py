"""A route whose function fails, or whose request is cancelled: what it answers and what it logs."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time

import pack
import utils.extra_config  # noqa: F401  the host's utils, before comfy brings in another one
from aiohttp.test_utils import make_mocked_request

pack.load_pack()
from custom_nodes_kontext.nodes import host_routes  # noqa: E402

LOG = io.StringIO()
logging.getLogger("kontext").addHandler(logging.StreamHandler(LOG))
REQUEST = make_mocked_request("GET", "/kontext/presets")


async def cancelled() -> bool:
    """Whether a handler that is cancelled while it works ends as cancelled."""
    task = asyncio.create_task(host_routes._answering(lambda _: time.sleep(0.2))(REQUEST))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait([task])
    return task.cancelled()


response = asyncio.run(host_routes._answering(lambda body: body["missing"])(REQUEST))
pack.answer(
    {
        "status": response.status,
        "type": response.content_type,
        "body": json.loads(response.body),
        "log": LOG.getvalue(),
        "cancelled": asyncio.run(cancelled()),
    }
)
