# SPDX-License-Identifier: Apache-2.0
"""A server on this machine that answers what huggingface_hub asks of the Hub to make a repository,
upload a folder to it and download it again. It keeps what it is given, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_ofTheTests"
COMMIT = "0" * 39 + "1"


class Repository:
    """One repository of models: files by name, and the messages of its commits."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []


class HubServer(ThreadingHTTPServer):
    """On a free port of the loopback interface, while the context is open."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # of Git LFS, by sha256
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *words: object) -> None:
        """Nothing on standard error."""

    def answer(self, code: int, values: Any = None, headers: dict[str, str] | None = None) -> None:
        body = values if isinstance(values, bytes) else json.dumps(values or {}).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: int, why: str) -> None:
        self.answer(code, {"error": why}, {"X-Error-Message": why})

    def handle_one(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "PUT":  # of an object, whose address is its permission
            self.server.objects[path.rpartition("/")[2]] = body
            return self.answer(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Invalid username or password.")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        name = name.removesuffix(".git")
        if name not in self.server.repositories:
            return self.refuse(404, "Repository not found")
        return self.in_repository(self.server.repositories[name], name, path, body)

    do_GET = do_POST = do_PUT = do_HEAD = handle_one

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "others":
            return self.refuse(403, "You don't have the rights to create a model under others")
        if name in self.server.repositories:
            return self.answer(409, {"error": "You already created this model repo",
                                     "url": f"{self.server.endpoint}/{name}"})
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.server.repositories[name] = Repository(private)
        return self.answer(200, {"url": f"{self.server.endpoint}/{name}"})

    def in_repository(self, repository: Repository, name: str, path: str, body: bytes) -> None:
        if "/preupload/" in path:
            modes = [{"path": file["path"], "shouldIgnore": False, "oid": None,
                      "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                     for file in json.loads(body)["files"]]
            return self.answer(200, {"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [{**wanted, "actions": {"upload": {
                "href": f"{self.server.endpoint}/object/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            return self.commit(repository, name, [*map(json.loads, body.splitlines())])
        if "/resolve/" in path:
            return self.file(repository, path.partition("/resolve/")[2].partition("/")[2])
        if "/tree/" in path or "/paths-info/" in path:
            return self.answer(200, [
                {"type": "file", "path": file, "size": len(data),
                 "oid": hashlib.sha1(data).hexdigest()}
                for file, data in repository.files.items()])
        return self.answer(200, {
            "id": name, "sha": COMMIT, "private": repository.private,
            "siblings": [{"rfilename": file} for file in repository.files]})

    def commit(self, repository: Repository, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = self.server.objects[value["oid"]]
                if (len(data), hashlib.sha256(data).hexdigest()) != (value["size"], value["oid"]):
                    return self.refuse(400, f"{value['path']}: another object was uploaded")
                repository.files[value["path"]] = data
        return self.answer(200, {"commitOid": COMMIT, "commitUrl":
                                 f"{self.server.endpoint}/{name}/commit/{COMMIT}"})

    def file(self, repository: Repository, name: str) -> None:
        if name not in repository.files:
            return self.refuse(404, "Entry not found")
        data = repository.files[name]
        return self.answer(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                                       "X-Repo-Commit": COMMIT})
