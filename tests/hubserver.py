"""A stand-in for the Hugging Face hub: the few addresses that huggingface_hub asks for, on this machine."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

PAGE = 1000


class Hub:
    """Repositories by id, each a mapping from revision to a mapping from path to bytes; `log` lists the requests."""

    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.log: list[str] = []
        self.address = ""

    def files(self, id, revision="main"):
        return self.repositories[id][revision]


@contextmanager
def serving():
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _sha(files):
    return hashlib.sha1(
        b"".join(name.encode() + content for name, content in sorted(files.items()))
    ).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer(body=True)

    def do_HEAD(self):
        self._answer(body=False)

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self._path()
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(content)
            id = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.hub.repositories.setdefault(id, {"main": {}})
            return self._json({"url": f"{self.hub.address}/{id}"})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        id, verb = "/".join(parts[2:4]), parts[4]
        revisions = self.hub.repositories[id]
        if verb == "branch":
            revisions[parts[5]] = dict(revisions["main"])
            return self._json({})
        if verb == "preupload":
            asked = json.loads(content)["files"]
            return self._json(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
                    ]
                }
            )
        if verb == "commit":
            for line in content.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    revisions[unquote(parts[5])][value["path"]] = base64.b64decode(value["content"])
            oid = _sha(revisions[unquote(parts[5])])
            return self._json(
                {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.address}/{id}/commit/{oid}"}
            )
        return self._json({"error": f"the stand-in does not know {path}"}, 404)

    def _path(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(f"{self.command} {path}")
        return path

    def _answer(self, body):
        path = self._path()
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._listing("/".join(parts[2:4]), parts[4:])
        id, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        found = self._files(id, revision)
        if isinstance(found, str):
            return self._missing(found)
        if name not in found:
            return self._missing("EntryNotFound")
        content = found[name]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", _sha(found))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _listing(self, id, rest):
        revision = rest[1] if rest[:1] in (["revision"], ["tree"]) else "main"
        found = self._files(id, revision)
        if isinstance(found, str):
            return self._missing(found)
        if rest[:1] == ["tree"]:
            files = [
                {"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()}
                for k, v in found.items()
            ]
            return self._json(files)
        siblings = [{"rfilename": name} for name in found]
        return self._json(
            {"id": id, "modelId": id, "sha": _sha(found), "siblings": siblings, "private": False}
        )

    def _files(self, id, revision):
        if id not in self.hub.repositories:
            return "RepoNotFound"
        revisions = self.hub.repositories[id]
        by_commit = {_sha(files): files for files in revisions.values()}
        return revisions.get(revision) or by_commit.get(revision) or "RevisionNotFound"

    def _missing(self, code):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, answer, status=200):
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
