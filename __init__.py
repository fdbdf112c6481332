"""ComfyUI's entry into this pack; see nodes/ for the nodes and kontext_core/ for the model itself."""

import importlib.util
import logging
import re

WEB_DIRECTORY = "./web"

OLDEST = (0, 3, 75)  # the ComfyUI that pyproject.toml names


def _host_version():
    """ComfyUI's version as numbers; None where it cannot be read."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return None
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(__version__))
    return tuple(int(number or 0) for number in numbers.groups()) if numbers else None


def _ask_for_update():
    version = _host_version()
    found = f"; this is {'.'.join(map(str, version))}" if version else ""
    needed = ".".join(map(str, OLDEST))
    logging.getLogger("kontext").error(
        f"FLUX.1 Kontext needs ComfyUI {needed} or newer{found}: update ComfyUI."
    )


async def comfy_entrypoint():
    """Called by ComfyUI 0.3.75 and newer; imports nothing before it is."""
    known_to_do = (_host_version() or (0,)) >= OLDEST
    try:
        from .nodes import KontextExtension

        if not known_to_do:  # what its comfy_api lacks shows in the schemas
            for node in await KontextExtension().get_node_list():
                node.define_schema()
        return KontextExtension()
    except Exception:
        if not known_to_do:
            _ask_for_update()
        raise


# A ComfyUI without comfy_entrypoint would only say that it found no nodes, one that calls it what it lacks.
if importlib.util.find_spec("comfy"):
    _latest = importlib.util.find_spec("comfy_api") and importlib.util.find_spec("comfy_api.latest")
    if not _latest or (_host_version() or OLDEST) < OLDEST:
        _ask_for_update()
