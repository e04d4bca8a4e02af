"""hf://OWNER/NAME by huggingface_hub's own code: from its cache, and from a server on this machine."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import file_download
from safetensors.torch import save_file
from torch import nn

from hyspark.models.weights.hub_address import local_path
from hyspark.models.weights.load import load_pretrained

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


def fill_cache(cache: Path, files: dict[str, Path], revision: str = "main", repo: str = "me/net") -> None:
    """Lay files out as huggingface_hub does."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    for name, path in files.items():
        target = folder / "snapshots" / COMMITS[revision] / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(COMMITS[revision])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def weights_of(value: float, path: Path) -> Path:
    save_file({"weight": torch.full((2, 3), float(value)), "bias": torch.full((2,), float(value))}, path)
    return path


def value_of(source: str) -> float:
    network = nn.Linear(3, 2)
    load_pretrained(network, source)
    return float(network.bias.detach()[0])


def test_paths_are_paths(tmp_path):
    assert local_path(tmp_path) == local_path(str(tmp_path)) == tmp_path


def test_a_repository_is_read_from_the_cache(cache, tmp_path):
    fill_cache(cache, {"model.safetensors": weights_of(1, tmp_path / "one")})
    fill_cache(cache, {"model.safetensors": weights_of(2, tmp_path / "two")}, "v1")
    assert value_of("hf://me/net") == value_of("hf://me/net@main") == 1
    assert value_of("hf://me/net@v1") == value_of(f"hf://me/net@{'b' * 40}") == 2
    assert local_path(Path("hf://me/net@v1")).name == "b" * 40  # a Path keeps one slash of two
    assert value_of("hf://me/net/model.safetensors") == 1
    assert value_of("hf://me/net@v1/model.safetensors") == 2
    with pytest.raises(FileNotFoundError, match=r"hf://me/net/other\.pth: no such file in the repository"):
        local_path("hf://me/net/other.pth")


def test_what_is_not_in_the_cache_is_named(cache, tmp_path):
    fill_cache(cache, {"model.safetensors": weights_of(1, tmp_path / "one")})
    for address, advice in (("hf://me/other", "`hf download me/other`"), ("hf://me/net@v9", "(revision v9)")):
        with pytest.raises(FileNotFoundError) as caught:
            local_path(address)
        message = str(caught.value)
        assert message.startswith(f"{address}: not in the cache of huggingface_hub, and downloads are off")
        assert advice in message


@pytest.mark.parametrize(
    "address", ["hf://", "hf://net", "hf://me/net@", "hf://me/net@a@b", "hf://me/", "hf://me/net/../../x"]
)
def test_other_forms_are_refused(cache, address):
    with pytest.raises(ValueError, match="expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION"):
        local_path(address)
    with pytest.raises(ValueError, match="expected hf://OWNER/NAME"):
        local_path("hf://me/net--work")


class Hub(BaseHTTPRequestHandler):
    """Answers of the Hub that a download needs.

    Attributes:
        files: content by name.
        refusal: X-Error-Code of every answer; empty: none.
        asked: names of files that were downloaded.
    """

    files: dict[str, bytes] = {}  # noqa: RUF012
    refusal = ""
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        path = self.path.partition("?")[0]
        if self.refusal:
            code = {"GatedRepo": 403, "Busy": 503}.get(self.refusal, 404)
            return self.reply(code, b"{}", {"X-Error-Code": self.refusal})
        if "/tree/" in path:
            found = [{"type": "file", "path": name, "size": len(x), "oid": "0" * 40} for name, x in self.files.items()]
            return self.reply(200, json.dumps(found).encode())
        if path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.files]
            about = {"id": "me/net", "_id": "1", "sha": COMMITS["main"], "siblings": siblings}
            return self.reply(200, json.dumps(about).encode())
        name = path.rpartition("/resolve/")[2].partition("/")[2]
        content = self.files[name]
        if self.command == "GET":
            self.asked.append(name)
        tag = hashlib.sha256(content).hexdigest()
        return self.reply(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMITS["main"]})

    do_HEAD = do_GET  # noqa: N815

    def reply(self, code, content, headers=None):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        """Print nothing."""


def forget_sessions() -> None:
    """Close the connections of huggingface_hub; before version 1, those of offline tests would stay offline."""
    from huggingface_hub.utils import _http

    getattr(_http, "close_session", getattr(_http, "reset_sessions", None))()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server in the stead of the Hub, with an empty cache; the class of its answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    values = {
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
    }
    for name, value in values.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
        if hasattr(file_download, name):  # before version 1
            monkeypatch.setattr(file_download, name, value)
    forget_sessions()
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "refusal", "")
    yield Hub
    server.shutdown()
    server.server_close()
    forget_sessions()


def test_weights_are_downloaded_without_what_is_not_read(hub, tmp_path):
    content = weights_of(3, tmp_path / "three").read_bytes()
    unread = {"README.md": b"#", "pytorch_model.bin": b"x", "fp16/model.safetensors": b"x", "train.csv": b"x"}
    hub.files = {"model.safetensors": content, "config.json": b'{"model_type": "x"}', **unread}
    assert value_of("hf://me/net") == 3
    assert sorted(hub.asked) == ["README.md", "config.json", "model.safetensors"]


def test_a_pickle_is_downloaded_where_there_is_nothing_safer(hub, tmp_path):
    torch.save({"weight": torch.ones(2, 3), "bias": torch.full((2,), 4.0)}, tmp_path / "four")
    hub.files = {"checkpoint_final.pth": (tmp_path / "four").read_bytes(), "train.csv": b"x"}
    assert value_of("hf://me/net") == 4
    assert hub.asked == ["checkpoint_final.pth"]


@pytest.mark.parametrize(
    ("refusal", "error", "says"),
    [
        ("RepoNotFound", FileNotFoundError, "hf://me/net: no such repository on the Hub, or a private one"),
        ("RevisionNotFound", FileNotFoundError, "hf://me/net: the repository has no revision"),
        ("GatedRepo", PermissionError, "hf://me/net: the repository is gated; accept its terms"),
        ("Busy", OSError, "hf://me/net: "),
    ],
)
def test_refusals_are_explained(hub, refusal, error, says, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.refusal = refusal
    with pytest.raises(error) as caught:
        local_path("hf://me/net")
    assert str(caught.value).startswith(says)
