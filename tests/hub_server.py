"""A small server of the Hugging Face hub's protocol, for its real client (HF_ENDPOINT)."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """Serves `repositories`: {owner/name: {file name: content}}, of datasets and models.

    `fetched` are the names whose content was sent, in order. Content of a name in `stalled` stops
    half way until the name is removed. A name in `refused` is listed, its content is not sent. A
    repository in `gated` answers 401.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories, self.fetched = repositories, []
        self.stalled, self.refused, self.gated = set(), set(), set()
        self.halfway = threading.Event()  # set when a stalled name has stopped
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_):
        self.stalled.clear()
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def head(self, status: int, length: int = 0, **headers: str):
        self.send_response(status)
        for name, value in {"Content_Length": str(length), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def answer(self):
        path = unquote(self.path.partition("?")[0])
        listing = re.fullmatch(r"/api/(?:dataset|model)s/([^/]+/[^/]+)(/\w+/\w+)?", path)
        file = re.fullmatch(rf"(?:/datasets)?/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path)
        if any(name in path for name in self.server.gated):
            self.head(401, X_Error_Code="GatedRepo")
        elif listing:
            self.send_listing(self.server.repositories[listing[1]], "/tree/" in path)
        elif file:
            self.send_file(self.server.repositories[file[1]][file[2]], file[2])
        else:
            self.head(404)

    do_GET = do_HEAD = answer

    def send_listing(self, files: dict[str, bytes], tree: bool):
        content = {"id": "x/y", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        if tree:
            sizes = {name: len(data) for name, data in files.items()}
            content = [dict(type="file", path=name, oid=name, size=sizes[name]) for name in files]
        body = json.dumps(content).encode()
        self.head(200, len(body), Content_Type="application/json")
        self.wfile.write(body)

    def send_file(self, data: bytes, name: str):
        if name in self.server.refused:
            self.head(403)
            return
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.head(200, len(data), ETag=etag, X_Repo_Commit=COMMIT)
        if self.command == "HEAD":
            return
        self.server.fetched.append(name)
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        while name in self.server.stalled:
            self.server.halfway.set()
            threading.Event().wait(0.02)
        self.wfile.write(data[len(data) // 2 :])
