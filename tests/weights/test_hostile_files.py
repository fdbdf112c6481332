"""Damaged, mislabelled and hostile files: one clear ValueError, quickly, without large allocations."""

from __future__ import annotations

import io
import json
import pickle
import random
import resource
import struct
import sys
import time
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from kontext_core.models.transformer import Flux, TransformerParams
from kontext_core.weights.convert import convert_file
from kontext_core.weights.files import open_weights
from kontext_core.weights.info import inspect_file
from kontext_core.weights.load import load_transformer
from kontext_core.weights.quantize import quantize_file

PARAMS = TransformerParams(
    in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=32, hidden_size=32, num_heads=1, depth=1,
    depth_single_blocks=1, axes_dim=(4, 14, 14),
)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(safetensors, GGUF) of a very small transformer."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    save_file(Flux(PARAMS).bfloat16().state_dict(), folder / "a.safetensors", metadata={"title": "small"})
    return folder / "a.safetensors", quantize_file(folder / "a.safetensors", folder / "a.gguf", type="Q8_0")


def safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list, begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(path, content: bytes, match: str) -> None:
    """The file is refused with these words and its name, in no time and no memory."""
    path.write_bytes(content)
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=match) as error:
        inspect_file(path)
    assert str(path) in str(error.value)
    assert time.perf_counter() - started < 2
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000 * (1024 if sys.platform == "darwin" else 1)


CASES = {
    "empty": (b"", "the file is empty"),
    "seven bytes": (b"\x01" * 7, "7 bytes and a header alone needs 8"),
    "header beyond the file": (
        safetensors({}, length=2**40),
        r"claims 1,099,511,627,776 bytes and the whole file",
    ),
    "header of the largest number": (safetensors({}, length=2**64 - 1), "the download is incomplete"),
    "header is no JSON": (safetensors(b"{nonsense}"), "header is not JSON"),
    "header is no UTF-8": (safetensors(b'{"\xff": 1}'), "header is not JSON"),
    "header nested without end": (safetensors(b'{"a":' + b"[" * 200_000), "header is not JSON"),
    "header is a list": (safetensors([1, 2]), "not a JSON object"),
    "a name twice": (
        safetensors(b'{"a":' + json.dumps(entry([1], 0, 4)).encode() + b',"a":1}', bytes(4)),
        "'a' stands in its header twice",
    ),
    "overlapping offsets": (
        safetensors({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
        "'b' overlaps 'a'",
    ),
    "a hole": (safetensors({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "4 bytes before 'b'"),
    "bytes at the end": (safetensors({"a": entry([1], 0, 4)}, bytes(9)), "5 bytes after its last tensor"),
    "beyond the end": (safetensors({"a": entry([4], 0, 16)}, bytes(8)), "download is incomplete"),
    "absurd shape": (safetensors({"a": entry([2**62, 2**62], 0, 4)}, bytes(4)), "takes .* bytes, but has 4"),
    "negative shape": (safetensors({"a": entry([-1, -4], 0, 16)}, bytes(16)), "impossible shape"),
    "fractional shape": (safetensors({"a": entry([1.0], 0, 4)}, bytes(4)), "impossible shape"),
    "boolean shape": (safetensors({"a": entry([True], 0, 4)}, bytes(4)), "impossible shape"),
    "a million dimensions": (safetensors({"a": entry([1] * 100_000, 0, 4)}, bytes(4)), "impossible shape"),
    "offsets backwards": (safetensors({"a": entry([1], 4, 0)}, bytes(4)), "impossible data_offsets"),
    "unknown dtype": (safetensors({"a": entry([1], 0, 4, "F31")}, bytes(4)), "unknown dtype 'F31'"),
    "dtype is a list": (safetensors({"a": entry([1], 0, 4, ["F32"])}, bytes(4)), "unknown dtype"),
    "entry is a number": (safetensors({"a": 7}), "lacks dtype, shape or data_offsets"),
    "metadata is no table": (safetensors({"__metadata__": {"a": 1}}), "not a table of strings"),
    "pickle": (pickle.dumps({"a": 1}), "pickled PyTorch file.*runs whatever code"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "web page": (b"<!DOCTYPE html><html>", "a web page"),
    "json": (b'{"weight_map": {}}', "a JSON file"),
    "gguf magic alone": (b"GGUF", "ends at byte 4 inside its header"),
    "gguf version": (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version is 99"),
    "gguf tensor count": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "1,152,921,504,606,846,976 tensors"),
    "gguf value count": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "claims 0 tensors and 9,223"),
    "gguf string length": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**61) + bytes(32),
        "a key claims 2,305,843,009,213,693,952 bytes",
    ),
    "gguf array length": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**50) + bytes(64),
        "claims 1,125,899,906,842,624 strings",
    ),
    "gguf array in array": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 2) + bytes(64),
        "unsupported item type 9",
    ),
    "gguf value type": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 77) + bytes(64),
        "unknown value type 77",
    ),
}


def gguf_tensor(name: str, shape: list[int], kind: int, offset: int) -> bytes:
    encoded = name.encode()
    return (
        struct.pack("<Q", len(encoded)) + encoded
        + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    )  # fmt: skip


def gguf_file(*tensors: bytes, data: int = 256) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(data)


CASES |= {
    "gguf absurd shape": (gguf_file(gguf_tensor("a", [2**62, 2**62], 0, 0)), "download is incomplete"),
    "gguf many dimensions": (gguf_file(gguf_tensor("a", [1] * 9, 0, 0)), "9 dimensions"),
    "gguf rows of half a block": (gguf_file(gguf_tensor("a", [31], 8, 0)), "no multiple of 32"),
    "gguf offset beyond": (gguf_file(gguf_tensor("a", [4], 0, 2**40)), "download is incomplete"),
    "gguf overlap": (gguf_file(gguf_tensor("a", [4], 0, 0), gguf_tensor("b", [4], 0, 8)), "'b' overlaps 'a'"),
    "gguf name twice": (gguf_file(gguf_tensor("a", [4], 0, 0), gguf_tensor("a", [4], 0, 32)), "header twice"),
    "gguf type not read": (
        gguf_file(gguf_tensor("a", [256], 23, 0)),
        "stored as IQ4_XS, which cannot be read",
    ),
    "gguf type unknown": (gguf_file(gguf_tensor("a", [256], 500, 0)), "type number 500"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_broken_file_is_refused_in_one_sentence(tmp_path, name):
    content, match = CASES[name]
    refused(tmp_path / "model.safetensors", content, match)


def test_pickles_of_every_age_are_refused_whatever_their_name(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    refused(tmp_path / "a.safetensors", buffer.getvalue(), "pickled PyTorch file")
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=False)
    refused(tmp_path / "a.gguf", buffer.getvalue(), "pickled PyTorch file")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x", "y")
    refused(tmp_path / "b", (tmp_path / "a.zip").read_bytes(), "pickled PyTorch file")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "C:\\x", ""]
)
def test_an_index_cannot_name_a_file_outside_its_folder(tmp_path, name):
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="which is not in its own folder"):
        open_weights(tmp_path)


def test_an_index_must_agree_with_its_shards(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(ValueError, match=r"names the file 'one\.safetensors', which is missing"):
        open_weights(tmp_path)
    save_file({"b": torch.zeros(1)}, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"says that 'a' is in one\.safetensors, and it is not"):
        open_weights(index)
    for text in ("[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {}}', "{", "[" * 100_000):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"not a readable index|not a table"):
            open_weights(index)


def test_names_that_number_a_billionth_layer_build_no_such_model(tmp_path):
    for key in (
        "encoder.block.999999999.layer.0.SelfAttention.q.weight",
        "text_model.encoder.layers.999999999.self_attn.q_proj.weight",
    ):
        first = key.replace("999999999", "0")
        save_file({key: torch.zeros(2, 2), first: torch.zeros(2, 2)}, tmp_path / "a.safetensors")
        info = inspect_file(tmp_path / "a.safetensors")
        assert "numbers a layer beyond its 2 tensors" in info.refused


def test_a_truncated_download_is_called_one(tmp_path, good):
    for source in good:
        content = source.read_bytes()
        for size in (len(content) - 1, len(content) // 2, 500):
            path = tmp_path / source.name
            path.write_bytes(content[:size])
            with pytest.raises(ValueError, match=r"download is incomplete|inside its header|claims"):
                load_transformer(path)


INTERESTING = [0, 1, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**64 - 1]


def mutated(content: bytes, header: int, dice: random.Random) -> bytes:
    """One to four changes, most of them in the header."""
    data = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        place = dice.randrange(min(header, len(data)) if dice.random() < 0.9 else len(data))
        kind = dice.randrange(6)
        if kind == 0:
            data[place] = dice.randrange(256)
        elif kind == 1:
            data[place : place + 8] = struct.pack("<Q", dice.choice(INTERESTING))
        elif kind == 2:
            data[place : place + 4] = struct.pack("<I", dice.choice(INTERESTING) % 2**32)
        elif kind == 3:
            del data[place : place + dice.randint(1, 40)]
        elif kind == 4:
            data[place:place] = data[dice.randrange(len(data)) :][: dice.randint(1, 40)]
        else:
            digits = str(dice.choice(INTERESTING)).encode()
            data[place : place + len(digits)] = digits
    return bytes(data)


@pytest.mark.parametrize("which", ["safetensors", "gguf"])
def test_no_mutation_of_a_good_file_does_anything_but_load_or_raise_value_error(tmp_path, good, which):
    source = good[which == "gguf"]
    content = source.read_bytes()
    if which == "safetensors":
        header = 8 + int.from_bytes(content[:8], "little")
    else:
        header = min(stored.start for stored in open_weights(source).tensors.values())
    dice = random.Random(which)
    path = tmp_path / source.name
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slowest, refusals = 0.0, 0
    for _ in range(400):
        path.write_bytes(mutated(content, header, dice) or b"\0")
        for function in (inspect_file, load_transformer):
            started = time.perf_counter()
            try:
                function(path)
            except ValueError as error:
                refusals += 1
                assert str(path) in str(error)
            slowest = max(slowest, time.perf_counter() - started)
    assert refusals > 200
    assert slowest < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000 * (
        1024 if sys.platform == "darwin" else 1
    )


def rearranged(content: bytes, dice: random.Random) -> bytes:
    """A valid file in which a few tensors are gone, renamed, of another shape or of another dtype."""
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    metadata, data = table.pop("__metadata__", None), content[8 + length :]
    tensors = {
        key: (item["dtype"], item["shape"], data[slice(*item["data_offsets"])]) for key, item in table.items()
    }
    sizes = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}
    for _ in range(dice.randint(1, 3)):
        key = dice.choice(list(tensors))
        dtype, shape, values = tensors[key]
        layer = key.rpartition(".")[0]
        change = dice.randrange(7)
        if change == 0:
            del tensors[key]
        elif change == 1:
            others = [
                "scaled_fp8",
                f"{layer}.weight_scale",
                f"{layer}.comfy_quant",
                key.replace("0", "7"),
                f"x.{key}",
            ]
            tensors[dice.choice(others)] = tensors.pop(key)
        elif change == 2:
            tensors[key] = (dtype, [0, *shape[1:]], b"")
        elif change == 3:
            tensors[key] = (dtype, shape[::-1], values)
        elif change == 4:
            tensors[key] = (dtype, [len(values) // sizes[dtype]], values)
        elif change == 5:
            tensors[key] = ("U8", [len(values)], values)
        else:
            tensors[key] = ("F32", [], bytes(4))
    header, position = {} if metadata is None else {"__metadata__": metadata}, 0
    for key, (dtype, shape, values) in tensors.items():
        header[key] = entry(shape, position, position + len(values), dtype)
        position += len(values)
    return safetensors(header, b"".join(values for _, _, values in tensors.values()))


@pytest.mark.parametrize("which", ["bfl", "diffusers", "fp8_scaled", "fp8_scaled_old"])
def test_valid_files_with_the_wrong_tensors_load_or_raise_value_error(tmp_path, good, which):
    source = convert_file(good[0], tmp_path / "source", to=which)
    content = (
        source / "diffusion_pytorch_model.safetensors" if which == "diffusers" else source
    ).read_bytes()
    dice = random.Random(which)
    path = tmp_path / "a.safetensors"
    for _ in range(100):
        path.write_bytes(rearranged(content, dice))
        for function in (inspect_file, load_transformer):
            try:
                function(path)
            except ValueError as error:
                assert str(path) in str(error)


@pytest.mark.parametrize("seed", range(3))
def test_json_headers_with_wrong_values_everywhere(tmp_path, good, seed):
    """Valid JSON with values of other types and sizes in any place of the table."""
    content = good[0].read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    dice = random.Random(seed)
    values = [None, True, -1, 0, 2**70, 1.5, "F32", "F8_E4M3", [], [0], [2**40, 2**40], {}, "x" * 1000]
    path = tmp_path / "a.safetensors"
    for _ in range(100):
        broken = json.loads(json.dumps(table))
        for _ in range(dice.randint(1, 3)):
            key = dice.choice(list(broken))
            place = dice.choice(["dtype", "shape", "data_offsets", "all", "name", "meta"])
            if place == "all":
                broken[key] = dice.choice(values)
            elif place == "name":
                broken[
                    dice.choice(["", "a.b", "img_in.weight_scale", "scaled_fp8", key + ".comfy_quant"])
                ] = broken.pop(key)
            elif place == "meta":
                text = dice.choice(
                    [
                        "",
                        "[]",
                        "{}",
                        '{"layers": 3}',
                        '{"layers": {"a": 1}}',
                        '{"layers": {"a": {"format": []}}}',
                    ]
                )
                broken["__metadata__"] = {"_quantization_metadata": text}
            elif isinstance(broken[key], dict):
                broken[key][place] = dice.choice(values)
        path.write_bytes(safetensors(broken, content[8 + length :]))
        for function in (inspect_file, load_transformer):
            try:
                function(path)
            except ValueError as error:
                assert str(path) in str(error)
