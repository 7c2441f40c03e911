"""Download and upload through huggingface_hub, against a small local server with the few routes it uses."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import rcd
import zoo
from zoo.__main__ import main
from zoo.hub import download, push_to_hub
from zoo.recipes import init_weights
from zoo.tokenizer import bytes_tokenizer

SHA = {"main": "a" * 40, "v1": "b" * 40}


class Hub(ThreadingHTTPServer):
    """Repositories as dictionaries, repos[id][commit] = {path: bytes}. It records downloads and creations."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Routes)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.fetched: list[str] = []
        self.created: list[dict] = []
        self.large: dict[str, bytes] = {}  # LFS objects by sha256
        self.tamper = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Routes(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def answer(self, body: bytes | dict | list = b"", status: int = 200, **headers: str) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        usual = {"Content-Length": str(len(body)), "Content-Type": "application/json"}
        for name, value in (usual | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            repo, revision = found[1], SHA.get(found[2] or "main", found[2])
            if repo not in self.server.repos:
                return self.missing("RepoNotFound")
            if revision not in self.server.repos[repo]:
                return self.missing("RevisionNotFound")
            files = [{"rfilename": name} for name in self.server.repos[repo][revision]]
            named = {"id": repo, "modelId": repo, "sha": revision}
            return self.answer({**named, "siblings": files, "private": False, "tags": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            files = self.server.repos.get(found[1], {}).get(SHA.get(found[2], found[2]), {})
            sizes = [{"type": "file", "path": n, "size": len(d)} for n, d in files.items()]
            oids = [{"oid": hashlib.sha1(d).hexdigest()} for d in files.values()]
            return self.answer([size | oid for size, oid in zip(sizes, oids)])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = found[1], SHA.get(found[2], found[2]), found[3]
            data = self.server.repos.get(repo, {}).get(revision, {}).get(name)
            if data is None:
                return self.missing("EntryNotFound")
            if self.command == "GET":
                self.server.fetched.append(name)
                if self.server.tamper:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    self.close_connection = True
                    return
            return self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=revision)
        self.missing("EntryNotFound")

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[self.path.rpartition("/")[2]] = body
        self.answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            created = json.loads(body)
            self.server.created.append(created)
            name = "/".join(filter(None, (created.get("organization"), created["name"])))
            self.server.repos.setdefault(name, {SHA["main"]: {}})
            return self.answer({"url": f"{self.server.url}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            paths = [f["path"] for f in json.loads(body)["files"]]
            modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
            files = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in zip(paths, modes)]
            return self.answer({"files": files})
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/put/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            files = self.server.repos[found[1]][SHA["main"]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.large[value["oid"]]
            url = f"{self.server.url}/{found[1]}/commit/{SHA['main']}"
            return self.answer({"commitUrl": url, "commitOid": SHA["main"], "success": True})
        self.missing("EntryNotFound")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running hub, which huggingface_hub takes for the real one, and an empty cache."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def folder_of(path: Path, seed: int = 0) -> Path:
    """A tiny SDAR in the hub's layout, made without transformers."""
    sizes = {"n_layer": 1, "d_model": 16, "d_ff": 16, "n_head": 2, "n_kv_head": 1, "head_dim": 8}
    model = rcd.Transformer(rcd.Config(vocab_size=258, mask_id=257, tied=False, **sizes))
    init_weights(model, torch.Generator().manual_seed(seed))
    tensors = model.state_dict().items()
    tensors = {n if n.startswith("lm_head") else f"model.{n}": t for n, t in tensors}
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({
        "model_type": "sdar", "vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 16,
        "max_position_embeddings": 64, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "mask_token_id": 257,
        "hidden_act": "silu",
    }))  # fmt: skip
    bytes_tokenizer(["<eos>", "<mask>"]).save(path)
    return path


def publish(hub: Hub, repo: str, folder: Path, revision: str = "main", **more: bytes) -> None:
    hub.repos.setdefault(repo, {})[SHA[revision]] = {p.name: p.read_bytes() for p in folder.iterdir()} | more


def is_private(created: dict) -> bool:
    """What the request says, in the words of a newer or an older huggingface_hub."""
    return created["visibility"] == "private" if "visibility" in created else created["private"]


def test_a_hub_id_loads_and_is_downloaded_once(hub, tmp_path):
    source = folder_of(tmp_path / "source")
    unwanted = {
        "modeling_sdar.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "README.md": b"hello",
        "onnx/config.json": b"{}", "original/model.safetensors": b"", "training_args.bin": b"x",
        "run.sh": b"x",
    }  # fmt: skip
    publish(hub, "JetLM/SDAR-tiny-Chat-b16", source, **unwanted)
    loaded = zoo.load("JetLM/SDAR-tiny-Chat-b16")
    assert sorted(hub.fetched) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert loaded.model.config.block_size == 16, "the block is in the repository's name, not the folder's"
    assert torch.equal(loaded.model.embedding, zoo.load(source).model.embedding)
    zoo.load("JetLM/SDAR-tiny-Chat-b16")
    assert len(hub.fetched) == 3
    hub.shutdown()
    hub.server_close()
    offline = zoo.load("JetLM/SDAR-tiny-Chat-b16")  # from the cache
    assert torch.equal(offline.model.embedding, loaded.model.embedding)


def test_a_pinned_revision(hub, tmp_path):
    for seed, revision in enumerate(SHA):
        publish(hub, "JetLM/SDAR-tiny", folder_of(tmp_path / revision, seed), revision)
    new, old = zoo.load("JetLM/SDAR-tiny").model, zoo.load("JetLM/SDAR-tiny@v1").model
    assert not torch.equal(new.embedding, old.embedding)
    assert torch.equal(old.embedding, zoo.load(tmp_path / "v1").model.embedding)
    assert download("JetLM/SDAR-tiny", SHA["v1"]) == download("JetLM/SDAR-tiny@v1")
    with pytest.raises(ValueError, match="two revisions of JetLM/SDAR-tiny: v1 and main"):
        download("JetLM/SDAR-tiny@v1", "main")


HERE = "on this machine there are: sudoku/reference, sudoku/target"


@pytest.mark.parametrize("name, match", [
    ("nobody/nothing", f"cannot get nobody/nothing from the hub: .* {HERE}"),
    ("JetLM/SDAR-tiny@v9", "at revision v9"), ("JetLM/--", "cannot get"),
])  # fmt: skip
def test_what_is_not_there(hub, tmp_path, name, match):
    publish(hub, "JetLM/SDAR-tiny", folder_of(tmp_path / "source"))
    with pytest.raises(FileNotFoundError, match=match) as caught:
        zoo.load(name)
    assert "\n" not in str(caught.value)


def test_a_download_that_breaks_off(hub, tmp_path, monkeypatch):
    publish(hub, "JetLM/SDAR-tiny", folder_of(tmp_path / "source"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the retries
    hub.tamper = True
    with pytest.raises(FileNotFoundError, match="cannot get JetLM/SDAR-tiny"):
        zoo.load("JetLM/SDAR-tiny")
    hub.tamper = False
    zoo.load("JetLM/SDAR-tiny")  # nothing half-fetched stands in the way


def test_a_repository_without_a_model(hub):
    hub.repos["JetLM/empty"] = {SHA["main"]: {"README.md": b"soon"}}
    with pytest.raises(FileNotFoundError, match="it has no config.json"):
        zoo.load("JetLM/empty")


def test_download_command(hub, tmp_path):
    """In a process of its own, with HF_ENDPOINT and HF_HUB_CACHE from the environment, as a user would."""
    publish(hub, "JetLM/SDAR-tiny", folder_of(tmp_path / "source"), "v1")
    root, cache = Path(zoo.__file__).parent.parent, tmp_path / "elsewhere"
    env = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}

    def command(revision: str) -> subprocess.CompletedProcess:
        argv = [sys.executable, "-m", "zoo", "download", "JetLM/SDAR-tiny", "--revision", revision]
        return subprocess.run(argv, capture_output=True, text=True, cwd=root, env=env)

    done = command("v1")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(cache) and (folder / "model.safetensors").is_file()
    done = command("v2")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: cannot get JetLM/SDAR-tiny at revision v2")


def test_push_and_load_again(hub, tmp_path):
    folder = folder_of(tmp_path / "mine")
    (folder / "README.md").write_text("# my model\n")
    states = "state.safetensors", "state.before.safetensors", "not-finite.safetensors"
    for secret in (*states, "log.jsonl", "notes.txt", "optimizer.pt"):
        (folder / secret).write_bytes(b"private")
    (folder / ".cache").mkdir()
    (folder / ".cache/config.json").write_text("{}")
    url = push_to_hub(folder, "me/RCD-SDAR-tiny-b8")
    assert url.startswith(hub.url + "/me/RCD-SDAR-tiny-b8/commit/")
    uploaded = hub.repos["me/RCD-SDAR-tiny-b8"][SHA["main"]]
    assert is_private(hub.created[0])
    assert {*uploaded} == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert all((folder / name).read_bytes() == data for name, data in uploaded.items())
    loaded = zoo.load("me/RCD-SDAR-tiny-b8")
    assert loaded.defaults["carry"] == "residual" and loaded.model.config.block_size == 8
    zoo.push_to_hub(folder, "me/public", private=False)
    assert not is_private(hub.created[1])


def test_push_refuses_what_is_no_model(hub, tmp_path):
    folder = folder_of(tmp_path / "mine")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-5])
    with pytest.raises(ValueError, match="is damaged"):
        push_to_hub(folder, "me/x")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        push_to_hub(folder, "me/x")
    with pytest.raises(FileNotFoundError, match="it has no config.json"):
        push_to_hub(tmp_path, "me/x")
    assert not hub.created
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(OSError, match="cannot upload .* to bad//name"):
        push_to_hub(folder, "bad//name")


def test_info_of_an_unknown_id_downloads_no_weights(hub, tmp_path, capsys):
    publish(hub, "JetLM/SDAR-tiny", folder_of(tmp_path / "mine"))
    main(["info", "JetLM/SDAR-tiny"])
    assert "sampler" in capsys.readouterr().out
    assert {path.name for path in zoo.find("JetLM/SDAR-tiny", weights=False).iterdir()} == {
        "config.json", "tokenizer.json"}  # fmt: skip
    assert (zoo.find("JetLM/SDAR-tiny") / "model.safetensors").is_file()


def test_info_of_an_unknown_name_is_one_line(hub, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["info", "nobody/nothing"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
