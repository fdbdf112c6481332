"""How alike faces are: found by YuNet, brought upright by five points, compared by an ArcFace network.

Both networks are ONNX files of the user's, run by ONNX Runtime on the CPU. The embedding is any that takes RGB faces of
112×112 in [-1, 1], such as AuraFace's glintr100.onnx; the detector is YuNet as OpenCV publishes it
(face_detection_yunet_2023mar.onnx), which may be used freely.

Source: arXiv 1801.07698 (ArcFace, its template of five points); opencv/opencv modules/objdetect/src/face_detect.cpp
(YuNet's outputs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 112
TEMPLATE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Where eyes, nose and corners of the mouth lie in an upright face, from the picture's left to its right."""
STRIDES = (8, 16, 32)
LONGEST = 640
"""The longer side that pictures are looked through at, where the detector leaves it open."""


@dataclass(frozen=True)
class Face:
    """A face in a picture.

    Attributes:
        box: left, top, right, bottom in pixels.
        landmarks: (5, 2) x and y in pixels, in the order of `TEMPLATE`.
        score: the detector's confidence, 0..1.
    """

    box: tuple[float, float, float, float]
    landmarks: Tensor
    score: float

    @property
    def area(self) -> float:
        left, top, right, bottom = self.box
        return max(0.0, right - left) * max(0.0, bottom - top)


@dataclass(frozen=True)
class Likeness:
    """A picture's face beside the reference's.

    Attributes:
        similarity: cosine of the two embeddings, -1..1; None where no face was found.
        face: (1, 3, 112, 112) in [-1, 1], the face that was compared; None where none was found.
    """

    similarity: float | None
    face: Tensor | None


def open_session(file: Path) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        ValueError: onnxruntime is not installed, or the file is missing or no ONNX model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            "faces are compared by ONNX Runtime, which is not installed here: run `pip install onnxruntime` in the "
            "environment that ComfyUI runs in"
        ) from error
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no class of their own
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"{file.name} is no ONNX model that ONNX Runtime can run: {reason}") from error


class FaceEmbedder:
    """An ArcFace network: faces of 112×112 to directions."""

    def __init__(self, file: Path) -> None:
        """Open the file.

        Raises:
            ValueError: as `open_session`, or a network of another shape.
        """
        self.session = open_session(file)
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        shape = [size for size in inputs[0].shape[1:] if isinstance(size, int)]
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or shape != [3, SIDE, SIDE] or len(outputs) != 1:
            raise ValueError(
                f"{file.name} takes {[i.shape for i in inputs]} and gives {len(outputs)} outputs; a face embedding "
                f"takes (1, 3, {SIDE}, {SIDE}) and gives one: choose an ArcFace model such as glintr100.onnx"
            )
        self._name = inputs[0].name

    def embed(self, faces: Tensor) -> Tensor:
        """(B, 3, 112, 112) RGB in [-1, 1] to (B, D) of length one."""
        rows = [
            torch.from_numpy(self.session.run(None, {self._name: face[None].numpy()})[0]).flatten(1)
            for face in faces.float().cpu().contiguous()
        ]
        return F.normalize(torch.cat(rows).float(), dim=1)


class FaceDetector:
    """YuNet: the faces of a picture with five points each."""

    def __init__(self, file: Path) -> None:
        """Open the file.

        Raises:
            ValueError: as `open_session`, or another kind of detector.
        """
        self.session = open_session(file)
        self._outputs = [f"{kind}_{stride}" for kind in ("cls", "obj", "bbox", "kps") for stride in STRIDES]
        found = {output.name for output in self.session.get_outputs()}
        if not found.issuperset(self._outputs):
            raise ValueError(
                f"{file.name} gives {', '.join(sorted(found)[:6])}; a YuNet detector gives cls_8, obj_8, bbox_8, kps_8 "
                "and so on: choose face_detection_yunet_2023mar.onnx"
            )
        self._input = self.session.get_inputs()[0]

    def find(self, image: Tensor, *, threshold: float = 0.7, overlap: float = 0.3) -> list[Face]:
        """The faces, most certain first.

        Args:
            image: (1, 3, H, W) RGB in [-1, 1].
            threshold: least confidence; overlap: share of two boxes above which they are one face.
        """
        height, width = image.shape[-2:]
        room = self._size(height, width)
        scale = min(room[0] / height, room[1] / width)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        small = F.interpolate(image.float().cpu(), size, mode="bilinear", antialias=True, align_corners=False)
        levels = ((small.clamp(-1, 1) + 1) * 127.5).flip(1)  # BGR of 0..255
        padded = F.pad(levels, (0, room[1] - size[1], 0, room[0] - size[0])).contiguous()
        values = self.session.run(self._outputs, {self._input.name: padded.numpy()})
        named = {
            name: torch.from_numpy(value).float().flatten(0, -2)
            for name, value in zip(self._outputs, values, strict=True)
        }
        ratio = torch.tensor([width / size[1], height / size[0]])
        faces: list[Face] = []
        for stride in STRIDES:
            faces += self._decode(named, stride, room[1] // stride, threshold, ratio)
        kept: list[Face] = []
        for face in sorted(faces, key=lambda face: -face.score):
            if all(_overlap(face, other) <= overlap for other in kept):
                kept.append(face)
        return kept

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that the network is run at: its own, or multiples of 32 around the picture."""
        rows, columns = self._input.shape[-2:]
        if isinstance(rows, int) and isinstance(columns, int):
            return rows, columns
        scale = LONGEST / max(height, width)
        return tuple(max(32, 32 * math.ceil(round(side * scale) / 32)) for side in (height, width))

    @staticmethod
    def _decode(
        named: dict[str, Tensor], stride: int, columns: int, threshold: float, ratio: Tensor
    ) -> list[Face]:
        scores = (named[f"cls_{stride}"].clamp(0, 1) * named[f"obj_{stride}"].clamp(0, 1)).sqrt()[:, 0]
        faces = []
        for cell in (scores >= threshold).nonzero()[:, 0].tolist():
            corner = torch.tensor([float(cell % columns), float(cell // columns)])
            offset, extent = named[f"bbox_{stride}"][cell].view(2, 2)
            middle, half = (corner + offset) * stride, extent.exp() * stride / 2
            left, top = ((middle - half) * ratio).tolist()
            right, bottom = ((middle + half) * ratio).tolist()
            points = (named[f"kps_{stride}"][cell].view(5, 2) + corner) * stride * ratio
            faces.append(Face((left, top, right, bottom), points, float(scores[cell])))
        return faces


def _overlap(a: Face, b: Face) -> float:
    """Intersection over union of two boxes."""
    width = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
    height = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / max(a.area + b.area - shared, 1e-9)


def align(image: Tensor, landmarks: Tensor) -> Tensor:
    """The face upright, (1, 3, 112, 112): turned, scaled and moved so that its points lie nearest to the template's.

    Args:
        image: (1, 3, H, W) in [-1, 1]; black is taken to lie around it.
        landmarks: (5, 2) x and y in pixels.

    Raises:
        ValueError: all points are one.
    """
    # As complex numbers a similarity is w = a·z + b, and the least squares have a closed form.
    z, w = (torch.complex(points[:, 0].double(), points[:, 1].double()) for points in (landmarks, TEMPLATE))
    centred = z - z.mean()
    spread = centred.abs().square().sum()
    if spread == 0:
        raise ValueError("the five points of a face are all the same")
    a = (centred.conj() * (w - w.mean())).sum() / spread
    b = w.mean() - a * z.mean()
    rows, columns = torch.meshgrid(*[torch.arange(SIDE, dtype=torch.float64)] * 2, indexing="ij")
    source = (torch.complex(columns, rows) - b) / a
    height, width = image.shape[-2:]
    grid = torch.stack(
        (2 * source.real / max(width - 1, 1) - 1, 2 * source.imag / max(height - 1, 1) - 1), -1
    )
    lifted = image.float().cpu() + 1
    return F.grid_sample(lifted, grid[None].float(), mode="bilinear", align_corners=True) - 1


def faces_of(image: Tensor, detector: FaceDetector | None) -> list[Tensor]:
    """The faces of a picture upright, largest first; without a detector the whole picture is the face.

    Args:
        image: (1, 3, H, W) in [-1, 1].
    """
    if detector is None:
        whole = F.interpolate(image.float().cpu(), (SIDE, SIDE), mode="bicubic", antialias=True)
        return [whole.clamp(-1, 1)]
    found = sorted(detector.find(image), key=lambda face: -face.area)
    return [align(image, face.landmarks) for face in found]


def compare_faces(
    reference: Tensor, images: Tensor, embedder: FaceEmbedder, detector: FaceDetector | None = None
) -> tuple[Tensor, list[Likeness]]:
    """The reference's largest face, and for each picture the face most like it.

    Args:
        reference: (1, 3, H, W); images: (B, 3, H, W), both in [-1, 1].

    Raises:
        ValueError: the reference has no face.
    """
    wanted = faces_of(reference, detector)
    if not wanted:
        raise ValueError(
            "no face was found in the reference: use a picture where it is seen from the front, or set the detector to "
            "“whole picture” and crop to the face"
        )
    direction = embedder.embed(wanted[0])
    likenesses = []
    for image in images.split(1):
        faces = faces_of(image, detector)
        if not faces:
            likenesses.append(Likeness(None, None))
            continue
        cosines = embedder.embed(torch.cat(faces)) @ direction[0]
        best = int(cosines.argmax())
        likenesses.append(Likeness(float(cosines[best]), faces[best]))
    return wanted[0], likenesses
