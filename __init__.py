"""ComfyUI's entry into this pack; see nodes/ for the nodes and kontext_core/ for the model itself."""

import importlib.util
import logging

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI 0.3.75 and newer; imports nothing before it is."""
    from .nodes import KontextExtension

    return KontextExtension()


# An older ComfyUI does not know comfy_entrypoint and would only say that it found no nodes.
if importlib.util.find_spec("comfy") and not (
    importlib.util.find_spec("comfy_api") and importlib.util.find_spec("comfy_api.latest")
):
    logging.getLogger("kontext").error("FLUX.1 Kontext needs ComfyUI 0.3.75 or newer: update ComfyUI.")
