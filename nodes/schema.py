"""What every node's schema shares: the category, our one type, and what newer hosts can show beyond older ones."""

from __future__ import annotations

import dataclasses
import inspect

from comfy_api.latest import io

CATEGORY = "Kontext"

KontextGeometry = io.Custom("KONTEXT_GEOMETRY")
# What a combo widget takes over a link: the host's own combo output stands for one list of choices.
Choice = io.Custom("COMBO")

# Hosts from 0.4 on fold rarely changed widgets away.
ADVANCED = {"advanced": True} if "advanced" in inspect.signature(io.Int.Input.__init__).parameters else {}

_KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def make_schema(**fields: object) -> io.Schema:
    """io.Schema without the fields that this host does not know yet, such as search_aliases."""
    return io.Schema(**{key: value for key, value in fields.items() if key in _KNOWN})
