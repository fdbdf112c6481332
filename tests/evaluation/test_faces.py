"""Faces: found where they are, brought upright, compared as the network's own numbers say."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from kontext_core.evaluation import faces


def save(path, nodes, inputs, outputs, constants=()):
    tensors = [numpy_helper.from_array(value, name) for name, value in constants]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, str(path))
    return path


def info(name, shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


@pytest.fixture(scope="module")
def embedding(tmp_path_factory):
    """A network of one random layer over the pixels."""
    weight = np.random.default_rng(0).standard_normal((3 * 112 * 112, 8)).astype(np.float32)
    return save(
        tmp_path_factory.mktemp("onnx") / "embedding.onnx",
        [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])],
        [info("x", ["N", 3, 112, 112])],
        [info("y", ["N", 8])],
        [("w", weight)],
    )


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """YuNet's outputs over another rule: a cell's score is how red it is, its face is the cell's own size."""
    nodes, outputs = [], []
    constants = [
        ("red", np.array([[[[0.0]], [[0.0]], [[1 / 255]]]], np.float32)),
        ("rows", np.array([1, -1, 1])),
    ]
    nodes.append(helper.make_node("Conv", ["x", "red"], ["r"]))  # the third channel of BGR
    for stride in faces.STRIDES:
        pooled, cells = f"p{stride}", (128 // stride) ** 2
        nodes.append(
            helper.make_node("AveragePool", ["r"], [pooled], kernel_shape=[stride] * 2, strides=[stride] * 2)
        )
        for kind in ("cls", "obj"):
            nodes.append(helper.make_node("Reshape", [pooled, "rows"], [f"{kind}_{stride}"]))
            outputs.append(info(f"{kind}_{stride}", [1, cells, 1]))
        box = np.tile(np.array([0.5, 0.5, 0, 0], np.float32), (1, cells, 1))
        points = np.tile(
            np.array([0.2, 0.3, 0.8, 0.3, 0.5, 0.6, 0.3, 0.8, 0.7, 0.8], np.float32), (1, cells, 1)
        )
        for kind, value in (("bbox", box), ("kps", points)):
            constants.append((f"c{kind}{stride}", value))
            nodes.append(helper.make_node("Identity", [f"c{kind}{stride}"], [f"{kind}_{stride}"]))
            outputs.append(info(f"{kind}_{stride}", list(value.shape)))
    path = tmp_path_factory.mktemp("onnx") / "detector.onnx"
    return faces.FaceDetector(save(path, nodes, [info("x", [1, 3, 128, 128])], outputs, constants))


def with_red(left, top, side, size=(256, 192)):
    """A black picture (H, W) with a red square."""
    image = torch.full((1, 3, *size), -1.0)
    image[:, 0, top : top + side, left : left + side] = 1
    return image


def test_a_face_is_found_where_it_is_in_a_picture_of_another_size(detector):
    # 256×192 is looked through at half its size: a cell of 32 there is 64 here
    found = detector.find(with_red(64, 128, 64), threshold=0.9)
    largest = max(found, key=lambda face: face.area)
    assert largest.box == pytest.approx((64, 128, 128, 192), abs=1.5)
    assert largest.landmarks[2].tolist() == pytest.approx([64 + 0.5 * 64, 128 + 0.6 * 64], abs=1.5)


def test_other_colours_are_no_face(detector):
    blue = with_red(64, 128, 64).roll(2, 1)
    assert detector.find(blue) == []


def test_boxes_of_one_face_are_one(detector):
    face = faces.Face((0, 0, 10, 10), faces.TEMPLATE, 0.9)
    assert faces._overlap(face, faces.Face((0, 0, 10, 10), faces.TEMPLATE, 0.8)) == pytest.approx(1)
    assert faces._overlap(face, faces.Face((5, 0, 15, 10), faces.TEMPLATE, 0.8)) == pytest.approx(1 / 3)
    found = detector.find(with_red(64, 128, 64), threshold=0.5, overlap=0.01)
    for i, one in enumerate(found):
        assert all(faces._overlap(one, other) <= 0.01 for other in found[i + 1 :])


@pytest.mark.parametrize("degrees", [0, 25, 180])
def test_a_turned_face_comes_upright(degrees):
    turn = 2.5 * np.exp(1j * np.radians(degrees))
    points = (torch.view_as_complex(faces.TEMPLATE.contiguous()).numpy() - (56 + 56j)) * turn + (250 + 240j)
    image = torch.full((1, 3, 500, 480), -1.0)
    y, x = np.mgrid[0:500, 0:480]
    for index, point in enumerate(points):
        dot = np.exp(-((x - point.real) ** 2 + (y - point.imag) ** 2) / 40)
        image[0, index % 3] += torch.from_numpy(2 * dot).float()
    face = faces.align(image, torch.view_as_real(torch.from_numpy(points)))
    assert face.shape == (1, 3, 112, 112)
    for index, (column, row) in enumerate(faces.TEMPLATE.tolist()):
        others = [p for i, p in enumerate(faces.TEMPLATE.tolist()) if i % 3 == index % 3 and i != index]
        channel = face[0, index % 3].clone()
        for other in others:  # two dots share a channel
            channel[int(other[1]) - 8 : int(other[1]) + 9, int(other[0]) - 8 : int(other[0]) + 9] = -1
        best = int(channel.argmax())
        assert (best % 112, best // 112) == (pytest.approx(column, abs=1), pytest.approx(row, abs=1))


def test_the_alignment_is_the_least_squares_one():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(5, 2, generator=generator).double() * 200
    x, y = points.T
    zero, one = torch.zeros(5).double(), torch.ones(5).double()
    matrix = torch.cat((torch.stack((x, -y, one, zero), 1), torch.stack((y, x, zero, one), 1)))
    wanted = torch.cat((faces.TEMPLATE[:, 0], faces.TEMPLATE[:, 1])).double()
    a, b, c, d = torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0].tolist()
    ramp = torch.linspace(-1, 1, 300)[None, None, None].expand(1, 3, 300, 300)  # a picture of x itself
    face = faces.align(ramp, points)
    back = (np.mgrid[0:112, 0:112][1] - c + 1j * (np.mgrid[0:112, 0:112][0] - d)) / (a + 1j * b)
    inside = (back.real > 1) & (back.real < 298) & (back.imag > 1) & (back.imag < 298)
    assert inside.sum() > 100
    assert face[0, 0].numpy()[inside] == pytest.approx(back.real[inside] / 299 * 2 - 1, abs=1e-3)


def test_similarity_is_the_cosine_of_the_networks_own_numbers(embedding):
    pictures = torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(1)) * 2 - 1
    _, found = faces.compare_faces(pictures[:1], pictures, faces.FaceEmbedder(embedding))
    session = ort.InferenceSession(str(embedding), providers=["CPUExecutionProvider"])
    rows = np.concatenate([session.run(None, {"x": p[None].numpy()})[0] for p in pictures])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    # a picture of 112×112 resized to 112×112 is itself
    assert [one.similarity for one in found] == pytest.approx((rows @ rows[0]).tolist(), abs=1e-4)
    assert found[0].similarity == pytest.approx(1, abs=1e-5)


def test_the_face_most_like_the_reference_is_taken_and_none_is_said(embedding, detector):
    network = faces.FaceEmbedder(embedding)
    reference = with_red(64, 128, 64)
    reference[:, 1, 150:160, 80:110] = 1  # something of its own
    two = reference.clone()
    two[:, :, :64, 64:192] = with_red(0, 0, 128)[:, :, :64, :128]
    wanted, found = faces.compare_faces(reference, torch.cat((two, -torch.ones_like(two))), network, detector)
    assert wanted.shape == found[0].face.shape == (1, 3, 112, 112)
    assert found[0].similarity > 0.999
    assert found[1] == faces.Likeness(None, None)
    with pytest.raises(ValueError, match="no face was found in the reference"):
        faces.compare_faces(-torch.ones_like(two), two, network, detector)


def test_files_of_another_kind_are_refused_in_a_sentence(embedding, tmp_path):
    with pytest.raises(ValueError, match="a YuNet detector gives"):
        faces.FaceDetector(embedding)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a network")
    with pytest.raises(ValueError, match=r"broken.onnx is no ONNX model"):
        faces.FaceEmbedder(broken)
    with pytest.raises(ValueError, match="there is no file"):
        faces.FaceEmbedder(tmp_path / "missing.onnx")
    other = save(
        tmp_path / "other.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        [info("x", [1, 3, 224, 224])],
        [info("y", [1, 3, 224, 224])],
    )
    with pytest.raises(ValueError, match="choose an ArcFace model"):
        faces.FaceEmbedder(other)


def test_without_onnxruntime_the_message_says_what_to_install(embedding, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="pip install onnxruntime"):
        faces.FaceEmbedder(embedding)
