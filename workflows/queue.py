"""Queue an API-format workflow on a running ComfyUI, wait for it with progress, and save what it makes.

    python workflows/queue.py workflows/api/local_edit.json --image photo.png \
        --set "KontextEdit.prompt=make the sky orange" --output output

Standard library only, for any ComfyUI that can be reached over HTTP. A node is named by its id, its title
or its class; a value is read as JSON when it is JSON and as text otherwise. Pictures that the workflow names
and that lie in `workflows/input` are uploaded by themselves. Exits with 1, and the server's own error, when
anything fails.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # this folder is first on the path then, and would hide Python's own `queue`
    sys.path.pop(0)

import argparse
import base64
import hashlib
import json
import mimetypes
import os
import socket
import ssl
import struct
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

INPUT_FOLDER = Path(__file__).resolve().parent / "input"


class WorkflowError(RuntimeError):
    """The server refused a workflow or a node of it failed; the text is what a person needs to read."""


class WebSocket:
    """The receiving half of RFC 6455: enough to read ComfyUI's messages.

    Args:
        url: http(s) address of the socket.
        timeout: seconds that `receive` waits before it raises TimeoutError.
    """

    def __init__(self, url: str, timeout: float):
        parts = urllib.parse.urlsplit(url)
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        self.connection = socket.create_connection((parts.hostname, port), timeout=30)
        if secure:
            context = ssl.create_default_context()
            self.connection = context.wrap_socket(self.connection, server_hostname=parts.hostname)
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        self.connection.sendall(request.encode())
        self.buffer = b""
        while b"\r\n\r\n" not in self.buffer:
            self._fill()
        header, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        digest = hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
        accept = base64.b64encode(digest)
        if b" 101 " not in header.split(b"\r\n")[0] or accept not in header:
            raise WorkflowError(f"{url} did not answer as a websocket: {header.splitlines()[0].decode()}")
        self.connection.settimeout(timeout)

    def _fill(self) -> None:
        chunk = self.connection.recv(65536)
        if not chunk:
            raise ConnectionError("the server closed the connection")
        self.buffer += chunk

    def _frame(self) -> tuple[bool, int, bytes]:
        """(is the last of its message, opcode, payload); a timeout leaves what has arrived in the buffer."""
        while True:
            if len(self.buffer) >= 2:
                length, start = self.buffer[1] & 0x7F, 2
                if length == 126 and len(self.buffer) >= 4:
                    length, start = struct.unpack(">H", self.buffer[2:4])[0], 4
                elif length == 127 and len(self.buffer) >= 10:
                    length, start = struct.unpack(">Q", self.buffer[2:10])[0], 10
                complete = (start > 2 or self.buffer[1] & 0x7F < 126) and len(self.buffer) >= start + length
                if complete:
                    first, payload = self.buffer[0], self.buffer[start : start + length]
                    self.buffer = self.buffer[start + length :]
                    return bool(first & 0x80), first & 0x0F, payload
            self._fill()

    def _send(self, opcode: int, payload: bytes) -> None:
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
        self.connection.sendall(bytes([0x80 | opcode, 0x80 | len(payload)]) + mask + masked)

    def receive(self) -> str | bytes:
        """The next message: text as str, binary as bytes.

        Raises:
            TimeoutError: nothing arrived in time.
            ConnectionError: the server closed the socket.
        """
        message, kind = b"", 0
        while True:
            last, opcode, payload = self._frame()
            if opcode == 0x8:
                raise ConnectionError("the server closed the connection")
            if opcode == 0x9:
                self._send(0xA, payload)
                continue
            if opcode == 0xA:
                continue
            kind = opcode or kind
            message += payload
            if last:
                return message.decode() if kind == 1 else message

    def close(self) -> None:
        self.connection.close()


class Client:
    """A ComfyUI over HTTP and its websocket.

    Args:
        server: address such as http://127.0.0.1:8188.
    """

    def __init__(self, server: str):
        self.server = server.rstrip("/")
        self.client_id = uuid.uuid4().hex
        self.socket: WebSocket | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def request(self, path: str, data: bytes | None = None, content_type: str = "application/json") -> bytes:
        """GET `path`, or POST `data` to it.

        Raises:
            WorkflowError: the server answered with an error, or not at all.
        """
        headers = {"Content-Type": content_type}
        request = urllib.request.Request(self.server + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            raise WorkflowError(_explain(error.code, error.read())) from None
        except urllib.error.URLError as error:
            raise WorkflowError(f"no ComfyUI answers at {self.server}: {error.reason}") from None

    def get(self, path: str):
        """GET `path` and parse its JSON."""
        return json.loads(self.request(path))

    def post(self, path: str, body: dict) -> dict:
        """POST `body` as JSON; the answer's JSON, empty when there is none."""
        answer = self.request(path, json.dumps(body).encode())
        return json.loads(answer) if answer.strip() else {}

    def upload(self, path: str | Path) -> str:
        """Put a picture into the server's input folder; returns the name that LoadImage takes."""
        path = Path(path)
        boundary = uuid.uuid4().hex
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{path.name}"\r\n'
            f"Content-Type: {kind}\r\n\r\n"
        )
        body = head.encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        answer = json.loads(self.request("/upload/image", body, f"multipart/form-data; boundary={boundary}"))
        return "/".join(part for part in (answer["subfolder"], answer["name"]) if part)

    def connect(self) -> None:
        """Open the websocket unless it is open.

        Raises:
            WorkflowError: nothing answers.
        """
        if self.socket is None:
            try:
                self.socket = WebSocket(f"{self.server}/ws?clientId={self.client_id}", timeout=5)
            except OSError as error:
                raise WorkflowError(f"no ComfyUI answers at {self.server}: {error}") from None

    def queue(self, workflow: dict) -> str:
        """Queue a workflow; returns its prompt id.

        Raises:
            WorkflowError: the server found it invalid.
        """
        self.connect()  # before queueing, so that no message of it is missed
        return self.post("/prompt", {"prompt": workflow, "client_id": self.client_id})["prompt_id"]

    def interrupt(self) -> None:
        """Stop what runs now."""
        self.request("/interrupt", b"{}")

    def wait(self, prompt_id: str, on_event: Callable[[str, dict | bytes], None] | None = None) -> dict:
        """Wait until a queued workflow ends; returns its history entry.

        Args:
            prompt_id: what `queue` returned.
            on_event: called with each message's type and data; previews come as ("preview", bytes).

        Raises:
            WorkflowError: a node failed (its message), or the run was interrupted.
        """
        self.connect()
        while True:
            try:
                message = self.socket.receive()
            except (TimeoutError, ConnectionError) as error:
                history = self.get(f"/history/{prompt_id}")  # a message may have been lost: ask
                if prompt_id in history:
                    return _finish(history[prompt_id])
                if isinstance(error, ConnectionError):
                    self.close()
                    self.connect()
                continue
            if isinstance(message, bytes):
                if on_event is not None and struct.unpack(">I", message[:4])[0] == 1:
                    on_event("preview", message[8:])
                continue
            event = json.loads(message)
            data = event.get("data") or {}
            if on_event is not None:
                on_event(event["type"], data)
            idle = event["type"] == "executing" and data.get("node") is None
            if data.get("prompt_id") == prompt_id and idle:  # sent last, when the history is written
                return _finish(self.get(f"/history/{prompt_id}")[prompt_id])

    def save(self, history: dict, folder: str | Path) -> list[Path]:
        """Download every output picture of a finished workflow into `folder`, in the order of the graph's nodes.

        The history has them in the order in which they ran, which differs from run to run.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        saved = []
        outputs = history["outputs"]
        graph = history["prompt"][2] if "prompt" in history else outputs
        places = {node_id: place for place, node_id in enumerate(graph)}
        for node_id in sorted(outputs, key=lambda name: places.get(name, len(places))):
            for items in outputs[node_id].values():
                for item in items if isinstance(items, list) else ():
                    if isinstance(item, dict) and item.get("type") == "output":
                        where = {key: item[key] for key in ("filename", "subfolder", "type")}
                        query = urllib.parse.urlencode(where)
                        target = folder / item["filename"]
                        target.write_bytes(self.request(f"/view?{query}"))
                        saved.append(target)
        return saved


def _explain(status: int, body: bytes) -> str:
    """The sentence inside an error answer of the server."""
    try:
        answer = json.loads(body)
    except ValueError:
        return f"the server answered {status}: {body.decode(errors='replace')[:500]}"
    error = answer.get("error", answer)
    lines = [str(error)]
    if isinstance(error, dict):
        lines = [f"{error.get('message', error)}. {error.get('details', '')}"]
    for node_id, node in (answer.get("node_errors") or {}).items():
        for problem in node["errors"]:
            lines.append(f"node {node_id} ({node['class_type']}): {problem['message']}: {problem['details']}")
    return "\n".join(lines)


def _finish(history: dict) -> dict:
    for kind, data in history["status"]["messages"]:
        if kind == "execution_error":
            text = data["exception_message"].strip()
            raise WorkflowError(f"node {data['node_id']} ({data['node_type']}): {text}")
        if kind == "execution_interrupted":
            raise WorkflowError(f"interrupted in node {data['node_id']} ({data['node_type']})")
    return history


def find_nodes(workflow: dict, name: str) -> list[str]:
    """Ids of the nodes with this id, title or class.

    Raises:
        WorkflowError: there is none.
    """
    found = [name] if name in workflow else []
    found = found or [key for key, node in workflow.items() if node.get("_meta", {}).get("title") == name]
    found = found or [key for key, node in workflow.items() if node["class_type"] == name]
    if not found:
        known = sorted({f"{key} ({node['class_type']})" for key, node in workflow.items()})
        raise WorkflowError(f"no node {name!r} in this workflow, which has {', '.join(known)}")
    return found


def set_input(workflow: dict, assignment: str) -> None:
    """Apply one `node.input=value` to every node of that name."""
    target, equals, text = assignment.partition("=")
    name, dot, key = target.rpartition(".")
    if not equals or not dot:
        raise WorkflowError(f"--set takes node.input=value, not {assignment!r}")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    for node_id in find_nodes(workflow, name):
        workflow[node_id]["inputs"][key] = value


def place_images(client: Client, workflow: dict, images: list[str]) -> None:
    """Upload `images` into the LoadImage nodes, in order or as `node=path`; then ours of workflows/input."""
    loaders = [key for key, node in workflow.items() if node["class_type"] == "LoadImage"]
    free = list(loaders)
    for image in images:
        name, equals, path = image.partition("=")
        if equals and not Path(image).exists():
            node_id = find_nodes(workflow, name)[0]
        elif free:
            node_id, path = free[0], image
        else:
            raise WorkflowError(f"{image!r} has no LoadImage node to go to: the workflow has {len(loaders)}")
        if not Path(path).is_file():
            raise WorkflowError(f"there is no picture {path!r}")
        workflow[node_id]["inputs"]["image"] = client.upload(path)
        free = [key for key in free if key != node_id]
    for node_id in free:
        ours = INPUT_FOLDER / str(workflow[node_id]["inputs"].get("image", ""))
        if ours.is_file():
            workflow[node_id]["inputs"]["image"] = client.upload(ours)


def print_progress(workflow: dict) -> Callable[[str, dict | bytes], None]:
    """An `on_event` that writes progress to standard error, one line a node and step."""

    def on_event(kind: str, data: dict | bytes) -> None:
        if kind == "executing" and data.get("node") in workflow:
            node = workflow[data["node"]]
            title = node.get("_meta", {}).get("title") or node["class_type"]
            print(f"{title} …", file=sys.stderr, flush=True)
        elif kind == "progress" and data["max"] > 1:
            print(f"  {data['value']:>3} / {data['max']}", file=sys.stderr, flush=True)

    return on_event


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("workflow", type=Path, help="a workflow in API format (workflows/api/*.json)")
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="address of the ComfyUI")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="change an input; may be repeated",
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="[NODE=]PATH", help="a picture for a LoadImage node"
    )
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the results")
    args = parser.parse_args(argv)
    try:
        workflow = json.loads(args.workflow.read_text(encoding="utf-8"))
        if "nodes" in workflow:
            raise WorkflowError(f"{args.workflow} is in UI format; use its twin in workflows/api")
        for assignment in args.set:
            set_input(workflow, assignment)
        with Client(args.server) as client:
            place_images(client, workflow, args.image)
            history = client.wait(client.queue(workflow), print_progress(workflow))
            for path in client.save(history, args.output):
                print(path)
    except (WorkflowError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
