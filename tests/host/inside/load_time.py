"""Processor seconds from importing the pack to having every node's schema, torch and the host being there."""

from __future__ import annotations

import asyncio
import time

import pack
import torch  # noqa: F401

# What the host has imported before it looks for packs, in its order.
import utils.extra_config  # noqa: F401  isort: skip
import server

import nodes  # noqa: F401  isort: skip

loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
server.PromptServer(loop)  # packs may add routes to it

started = time.process_time()
module = pack.load_pack()
extension = loop.run_until_complete(module.comfy_entrypoint())
classes = loop.run_until_complete(extension.get_node_list())
for node in classes:
    node.GET_SCHEMA()
seconds = time.process_time() - started
pack.answer({"seconds": seconds, "nodes": len(classes)})
