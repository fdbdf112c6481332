"""Processor seconds from importing the pack to having every node's schema, torch and the host being there."""

from __future__ import annotations

import asyncio
import time

import pack
import torch  # noqa: F401

import nodes  # noqa: F401  the host's own; it imports what every pack finds imported

started = time.process_time()
module = pack.load_pack()
extension = asyncio.run(module.comfy_entrypoint())
classes = asyncio.run(extension.get_node_list())
for node in classes:
    node.GET_SCHEMA()
seconds = time.process_time() - started
pack.answer({"seconds": seconds, "nodes": len(classes)})
