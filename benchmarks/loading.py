"""Loading and resident weights: `python benchmarks/loading.py [--json] [--gigabytes 2]`.

Loads one bfloat16 transformer file of the published width with `load_transformer` and with
`safetensors.torch.load_file`, each in a process of its own: seconds until the module is there, seconds until
every weight was read once, and peak memory above what the imports take. What stays in memory while sampling is
`resident.py`'s question.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from kontext_core.models.transformer import Flux, TransformerParams  # noqa: E402
from kontext_core.weights.load import load_transformer  # noqa: E402
from kontext_core.weights.packed import PlainOperations  # noqa: E402
from kontext_core.weights.safetensors_file import write_safetensors  # noqa: E402


def write_file(path: Path, gigabytes: float) -> None:
    """Single-stream blocks until the size is reached; every weight 0.01."""
    blocks = max(round((gigabytes * 1e9 / 2 - 4.6e8) / 1.42e8), 1)
    module = Flux(TransformerParams(depth=1, depth_single_blocks=blocks), device="meta")
    layout = {key: (torch.bfloat16, tuple(p.shape)) for key, p in module.named_parameters()}
    write_safetensors(
        path, layout, ((key, torch.full(shape, 0.01, dtype=d)) for key, (d, shape) in layout.items())
    )


def peak() -> int:
    """The most memory this process has had, its program before `exec` not counted where the system tells."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def child(how: str, path: Path) -> None:
    """Loads once and prints what it took."""
    import safetensors.torch

    torch.set_num_threads(1)
    before, started = peak(), time.perf_counter()
    if how == "ours":
        module = load_transformer(path)
    else:
        state = safetensors.torch.load_file(path)
        blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("single_blocks."))
        params = TransformerParams(depth=1, depth_single_blocks=blocks)
        module = Flux(params, operations=PlainOperations, device="meta")
        module.load_state_dict(state, assign=True, strict=True)
        del state
    loaded = time.perf_counter() - started
    total = sum(parameter.view(torch.int16).max().item() for parameter in module.parameters())
    answer = {
        "seconds_to_load": loaded,
        "seconds_to_read_all": time.perf_counter() - started,
        "peak_bytes": peak() - before,
        "checksum": total,
    }
    print(json.dumps(answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--gigabytes", type=float, default=2.0, help="size of the file (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", nargs=2, metavar=("HOW", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], Path(args.child[1]))
    report: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        write_file(path, args.gigabytes)
        report["file_bytes"] = path.stat().st_size
        # In turns, with the file in the system's cache after the first; the best times count.
        runs: dict[str, list[dict]] = {"ours": [], "safetensors": []}
        for how in ("ours", "safetensors") * 4:
            command = [sys.executable, __file__, "--child", how, str(path)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            runs[how].append(json.loads(output))
        for how, rows in runs.items():
            report[how] = {key: min(row[key] for row in rows) for key in rows[0] if key != "peak_bytes"}
            report[how]["peak_bytes"] = max(row["peak_bytes"] for row in rows)
    print(json.dumps(report) if args.json else as_text(report))


def as_text(report: dict) -> str:
    size, lines = report["file_bytes"], [f"a file of {report['file_bytes'] / 1e9:.2f} GB"]
    for how in ("ours", "safetensors"):
        row = report[how]
        lines.append(
            f"  {how:12} {row['seconds_to_load']:7.2f} s to load, {row['seconds_to_read_all']:7.2f} s with every "
            f"weight read, peak {row['peak_bytes'] / size:.2f} times the file"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
