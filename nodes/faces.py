"""Kontext Face Similarity: whether it is still the same person."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..kontext_core import images
from ..kontext_core.evaluation.faces import SIDE, FaceDetector, FaceEmbedder, compare_faces
from . import host, host_faces, host_graph
from .schema import CATEGORY, make_schema

WHOLE = "whole picture"


class KontextFaceSimilarity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        networks = host_faces.list_networks()
        detectors = [name for name in networks if name != host_faces.MISSING]
        return make_schema(
            node_id="KontextFaceSimilarity",
            display_name="Kontext Face Similarity",
            category=CATEGORY,
            description="Measures whether edits kept a person's face: the cosine between ArcFace embeddings of the "
            "reference's face and each picture's. Needs onnxruntime and network files of yours.",
            search_aliases=["arcface", "auraface", "identity", "same person", "character consistency"],
            inputs=[
                io.Image.Input(
                    "reference", tooltip="The picture with the face to keep; of a batch the first."
                ),
                io.Image.Input("image", tooltip="The pictures to compare, such as the turns of a session."),
                io.Combo.Input(
                    "embedder",
                    options=networks,
                    tooltip="An ArcFace network in models/insightface that takes faces of 112×112, such as AuraFace's "
                    "glintr100.onnx.",
                ),
                io.Combo.Input(
                    "detector",
                    options=[WHOLE, *detectors],
                    default=WHOLE,
                    tooltip="A YuNet network in models/insightface (face_detection_yunet_2023mar.onnx) that finds the "
                    "faces and brings them upright; or the whole picture, cropped to the face already.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="similarity",
                    tooltip="Mean cosine over the pictures with a face: 1 is the same picture, around 0 another "
                    "person.",
                ),
                io.Image.Output(
                    display_name="faces",
                    tooltip="The faces that were compared, upright: the reference's first; black where none was found.",
                ),
                io.String.Output(display_name="report", tooltip="The numbers, a line a picture."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, embedder, detector, **_: object):
        names = [embedder] if detector == WHOLE else [embedder, detector]
        return [host.fingerprint(host_faces.FOLDER, name) for name in names]

    @classmethod
    def execute(cls, reference, image, embedder, detector) -> io.NodeOutput:
        network = FaceEmbedder(host.find_file(host_faces.FOLDER, embedder))
        finder = None if detector == WHOLE else FaceDetector(host.find_file(host_faces.FOLDER, detector))
        start, _ = images.from_comfy(reference)
        pictures, _ = images.from_comfy(image)
        wanted, found = compare_faces(start[:1], pictures, network, finder)
        measured = [one.similarity for one in found if one.similarity is not None]
        if not measured:
            raise ValueError(
                f"no face was found in any of the {len(found)} pictures: set the detector to “{WHOLE}” and crop them "
                "to the face"
            )
        lines = [
            f"{number}. "
            + ("no face found" if one.similarity is None else f"similarity {one.similarity:.3f}")
            for number, one in enumerate(found, 1)
        ]
        black = -torch.ones(1, 3, SIDE, SIDE)
        faces = images.to_comfy(
            torch.cat([wanted, *(black if one.face is None else one.face for one in found)])
        )
        host_graph.tell(cls.hidden.unique_id, lines)
        return io.NodeOutput(
            sum(measured) / len(measured), faces, "\n".join(lines), ui=ui.PreviewImage(faces, cls=cls)
        )
