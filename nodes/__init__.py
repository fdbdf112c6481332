"""The nodes of this pack. Each file holds a few nodes of one purpose; host*.py alone touch ComfyUI's insides."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io


class KontextExtension(ComfyExtension):
    """What ComfyUI asks for when it loads the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from . import host_routes
        from .accelerate import KontextAccelerate
        from .bench import KontextBenchItem, KontextCompare
        from .conditioning import KontextPrompt, KontextReference
        from .drift import KontextDrift
        from .edit import KontextEdit
        from .estimate import KontextEstimate
        from .faces import KontextFaceSimilarity
        from .geometry import KontextRestore
        from .guard import KontextGuard
        from .loaders import KontextLoadModel, KontextLoadTextEncoders, KontextLoadVAE
        from .lora import KontextLoadLora
        from .preserve import KontextPreserve
        from .prompts import KontextPreset
        from .record import KontextLoadRecord, KontextSave
        from .sampling import KontextSampler, KontextSchedule
        from .training import KontextDataset, KontextTrainLora
        from .turns import KontextTurns

        host_routes.register()
        return [
            KontextLoadModel,
            KontextLoadTextEncoders,
            KontextLoadVAE,
            KontextPrompt,
            KontextReference,
            KontextSchedule,
            KontextSampler,
            KontextEdit,
            KontextRestore,
            KontextPreset,
            KontextPreserve,
            KontextTurns,
            KontextDrift,
            KontextLoadLora,
            KontextEstimate,
            KontextGuard,
            KontextSave,
            KontextLoadRecord,
            KontextAccelerate,
            KontextDataset,
            KontextTrainLora,
            KontextCompare,
            KontextBenchItem,
            KontextFaceSimilarity,
        ]
