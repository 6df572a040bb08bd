"""Downloading the benchmark, from a server of our own that answers as GitHub does: what arrives is verified."""

import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from projected_grpo import cli
from projected_grpo.env import download as download_module
from projected_grpo.env.download import SUMS, Source, blob_hash, download
from projected_grpo.errors import InputError

TRAIN, TEST = "leetcode_train_medhard_filtered.jsonl", "leetcode_test_medhard.jsonl"
PATHS = {TRAIN: f"results/data/{TRAIN}", TEST: f"results/data/{TEST}"}
REPOSITORY = "someone/benchmark"


class Hub:
    """A repository on a server: `files` are its content, `listed` the hashes that differ from it, `asked` the paths."""

    def __init__(self):
        self.files = {
            PATHS[TRAIN]: b'{"id": 1}\n',
            PATHS[TEST]: b'{"id": 2}\n',
            "README.md": b"A benchmark.\n",
            "results/data/leetcode_train_easy.jsonl": b"{}\n",
        }
        self.listed: dict[str, str] = {}
        self.answers: dict[str, bytes] = {}
        self.missing_bytes = 0
        self.asked: list[str] = []

    @property
    def commit(self) -> str:
        return hashlib.sha1(json.dumps({k: v.decode() for k, v in self.files.items()}).encode()).hexdigest()

    def answer(self, path: str) -> bytes | None:
        if path in self.answers:
            return self.answers[path]
        if path == f"/api/repos/{REPOSITORY}/commits/main":
            return json.dumps({"sha": self.commit}).encode()
        if path == f"/api/repos/{REPOSITORY}/git/trees/{self.commit}?recursive=1":
            tree = [
                {"path": name, "type": "blob", "sha": self.listed.get(name, blob_hash(data))}
                for name, data in self.files.items()
            ]
            tree.append({"path": "results/data", "type": "tree", "sha": "0" * 40})
            tree.append({"path": "leetcode_train_medhard.jsonl", "type": "commit", "sha": "0" * 40})
            return json.dumps({"sha": self.commit, "tree": tree, "truncated": False}).encode()
        return self.files.get(path.removeprefix(f"/raw/{REPOSITORY}/{self.commit}/"))

    @property
    def fetched(self) -> list[str]:
        """Files asked for since the last look."""
        names = [path.rpartition("/")[2] for path in self.asked if path.startswith("/raw/")]
        self.asked.clear()
        return names


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def served():
    """(the hub, where it is)."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            hub.asked.append(self.path)
            data = hub.answer(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header(
                "Content-Length", str(len(data or b"") + hub.missing_bytes * self.path.startswith("/raw/"))
            )
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        where = f"http://127.0.0.1:{server.server_port}"
        yield hub, Source(REPOSITORY, api=f"{where}/api", raw=f"{where}/raw")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def nowhere():
    """A source where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused while the test runs
        where = f"http://127.0.0.1:{taken.getsockname()[1]}"
        yield Source(REPOSITORY, api=where, raw=where)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def refused(folder, source) -> str:
    with pytest.raises(InputError) as caught:
        download(folder, source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_hash_is_gits():
    assert blob_hash(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert blob_hash(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_files_of_the_benchmark_are_fetched_and_their_sums_written(served, tmp_path):
    hub, source = served
    folder = tmp_path / "new" / "data"
    assert download(folder, source) == [folder / TEST, folder / TRAIN]
    assert names(folder) == sorted([SUMS, TEST, TRAIN])
    assert (folder / TRAIN).read_bytes() == hub.files[PATHS[TRAIN]]
    sums = [line.split("  ") for line in (folder / SUMS).read_text().splitlines()]
    assert sums == [[hashlib.sha256(hub.files[PATHS[name]]).hexdigest(), name] for name in (TEST, TRAIN)]
    assert sorted(hub.fetched) == sorted([TEST, TRAIN])


def test_a_second_download_fetches_no_file_again(served, tmp_path):
    hub, source = served
    first = download(tmp_path, source)
    sums = (tmp_path / SUMS).read_bytes()
    assert len(hub.fetched) == 2
    assert download(tmp_path, source) == first
    assert hub.fetched == []
    assert (tmp_path / SUMS).read_bytes() == sums


def test_a_missing_or_damaged_file_is_fetched_again(served, tmp_path):
    hub, source = served
    download(tmp_path, source)
    hub.asked.clear()
    (tmp_path / TEST).unlink()
    download(tmp_path, source)
    assert hub.fetched == [TEST]
    (tmp_path / TRAIN).write_bytes(b"damaged")
    download(tmp_path, source)
    assert hub.fetched == [TRAIN]
    assert (tmp_path / TRAIN).read_bytes() == hub.files[PATHS[TRAIN]]


def test_content_that_is_not_what_is_listed_is_refused_and_not_written(served, tmp_path):
    hub, source = served
    hub.listed = {path: blob_hash(b"what was listed") for path in PATHS.values()}
    assert f"{PATHS[TEST]}: what arrived is not what {REPOSITORY} lists" in refused(tmp_path, source)
    assert names(tmp_path) == []
    (tmp_path / TEST).write_bytes(b"old")
    refused(tmp_path, source)
    assert names(tmp_path) == [TEST]
    assert (tmp_path / TEST).read_bytes() == b"old"


def test_a_file_that_changed_upstream_is_refused(served, tmp_path):
    hub, source = served
    download(tmp_path, source)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    hub.files[PATHS[TRAIN]] = b'{"id": 3}\n'
    message = refused(tmp_path, source)
    assert PATHS[TRAIN] in message
    assert f"no longer the file whose hash is in {tmp_path / SUMS}; download to another folder" in message
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    (tmp_path / TRAIN).unlink()
    refused(tmp_path, source)
    assert not (tmp_path / TRAIN).exists()
    download(tmp_path / "other", source)
    assert (tmp_path / "other" / TRAIN).read_bytes() == b'{"id": 3}\n'


def test_a_file_on_disk_that_is_not_the_one_of_the_first_download_is_refused(served, tmp_path):
    """It is upstream's newest, and still not what SHA256SUMS says."""
    hub, source = served
    download(tmp_path, source)
    sums = (tmp_path / SUMS).read_bytes()
    hub.files[PATHS[TRAIN]] = b'{"id": 3}\n'
    (tmp_path / TRAIN).write_bytes(b'{"id": 3}\n')
    assert "no longer the file whose hash is in" in refused(tmp_path, source)
    assert (tmp_path / SUMS).read_bytes() == sums


def test_a_connection_that_breaks_off_is_one_line(served, tmp_path):
    hub, source = served
    hub.missing_bytes = 10
    assert "cannot be fetched" in refused(tmp_path, source)
    assert names(tmp_path) == []


def test_without_a_network_it_is_one_line_that_says_what_to_do(nowhere, tmp_path):
    message = refused(tmp_path / "data", nowhere)
    assert message.startswith(f"{nowhere.api}/repos/{REPOSITORY}/commits/main cannot be fetched (")
    assert "refused" in message
    assert message.endswith("with no network, copy the file here and give its path")
    assert not (tmp_path / "data").exists()


def test_a_repository_without_such_files(served, tmp_path):
    hub, source = served
    hub.files = {"README.md": b"", "data/leetcode_train_medhard.txt": b"", "data/my_leetcode_test_medhard.jsonl": b""}
    message = refused(tmp_path / "data", source)
    assert message == f"{REPOSITORY} at main has no file of the benchmark; give a file by its path"
    assert not (tmp_path / "data").exists()


def test_a_repository_that_is_not_there(served, tmp_path):
    _, source = served
    message = refused(tmp_path / "data", Source("no/body", api=source.api, raw=source.raw))
    assert "/repos/no/body/commits/main cannot be fetched (Not Found)" in message


def test_an_answer_that_is_no_json_is_refused(served, tmp_path):
    hub, source = served
    hub.answers[f"/api/repos/{REPOSITORY}/commits/main"] = b"<html>busy</html>"
    assert "answers with something that is no JSON; try again later" in refused(tmp_path / "data", source)


def test_the_command(served, nowhere, tmp_path, capsys, monkeypatch):
    hub, source = served
    monkeypatch.setattr(download_module, "Source", lambda: source)
    assert cli.main(["download-data", "--out", str(tmp_path / "data")]) == 0
    assert names(tmp_path / "data") == sorted([SUMS, TEST, TRAIN])
    said = capsys.readouterr()
    assert f"{tmp_path / 'data' / TRAIN}: {len(hub.files[PATHS[TRAIN]])} bytes, verified" in said.out + said.err
    monkeypatch.setattr(download_module, "Source", lambda: nowhere)
    assert cli.main(["download-data", "--out", str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
