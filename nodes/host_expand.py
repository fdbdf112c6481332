"""Nodes that become several: a small graph that the host runs, shows, caches and cancels as its own.

Source: Comfy-Org/ComfyUI comfy_execution/graph_utils.py; execution.py `get_input_data` ("rawLink").
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder

# The node is given the link itself, which it hands on: what it becomes is then cached by what it depends on.
AS_LINK = {"rawLink": True}


def new_graph() -> GraphBuilder:
    """An empty graph whose node ids depend only on the node that makes it, so that its results are found again."""
    return GraphBuilder()


def defaults(node: type[io.ComfyNode]) -> dict[str, Any]:
    """The widgets of one of our nodes at their defaults: a made graph has none filled in."""
    return {
        item.id: item.default
        for item in node.define_schema().inputs
        if getattr(item, "default", None) is not None
    }
