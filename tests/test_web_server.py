"""Who may reach the page, and what of Gradio can be reached: this page's requests and nothing else."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from chat_models import ScriptedModel, small_model
from click.testing import CliRunner

from chat.web_server import listen, serve
from pipeline.cli import cli
from pipeline.errors import MedcotError

pytest.importorskip("gradio", reason="gradio is not installed (requirements-chat.txt)")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def addresses() -> list[object]:
    """Every address that this process asks for or connects to from now on."""
    seen: list[object] = []

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "socket.connect":
            seen.append(arguments[1])
        elif event == "socket.getaddrinfo":
            seen.append(arguments[0])

    sys.addaudithook(note)
    return seen


@pytest.fixture(scope="module")
def url(addresses: list[object]) -> Iterator[str]:
    from web_pages import WebModel, served

    with served([WebModel("m", ScriptedModel([]))]) as address:
        yield address


@pytest.fixture(scope="module")
def guarded_url() -> Iterator[str]:
    from web_pages import WebModel, served

    with served([WebModel("m", ScriptedModel([]))], password="correct horse", only_local=False) as address:
        yield address


def test_the_server_itself_asks_nothing_of_other_machines(url: str, addresses: list[object]) -> None:
    assert httpx.get(url).status_code == 200
    hosts = {address[0] if isinstance(address, tuple) else address for address in addresses}
    assert "127.0.0.1" in hosts and hosts <= {"127.0.0.1", b"127.0.0.1", "::1", None}


def test_the_page_is_there_and_asks_browsers_to_fetch_nothing_from_elsewhere(url: str) -> None:
    page = httpx.get(url)
    assert page.status_code == 200 and '"title":"medcot: m"' in page.text
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'self' data: blob: ") and "http" not in policy


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/monitoring/summary",
        "/gradio_api/proxy=http://x.hf.space/",
        "/gradio_api/upload_progress?upload_id=1", "/gradio_api/queue/status", "/gradio_api/deep_link",
        "/gradio_api/runs", "/gradio_api/openapi.json", "/docs", "/gradio_api/token", "/gradio_api/call/ask/1",
    ],
)  # fmt: skip
def test_gradios_other_endpoints_are_out_of_reach(path: str, url: str) -> None:
    answer = httpx.get(url + path)
    assert (answer.status_code, answer.text) == (404, "There is nothing here.\n")


@pytest.mark.parametrize("path", ["/static/../../../../../../etc/passwd", "/assets/%2e%2e/%2e%2e/routes.py"])
def test_no_path_leads_out_of_gradios_own_files(path: str, url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:  # a client that leaves the dots alone
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert re.match(rb"HTTP/1.1 (403|404) ", answer) and b"root:" not in answer


@pytest.mark.parametrize("path", ["upload", "component_server", "call/ask", "run/ask", "api/ask", "vibe-edit"])
def test_nothing_can_be_uploaded_or_called(path: str, url: str) -> None:
    assert httpx.post(f"{url}/gradio_api/{path}", json={"data": []}).status_code == 404
    assert httpx.put(url + "/").status_code == 404


def test_no_endpoint_is_offered_to_programs(url: str) -> None:
    offered = httpx.get(url + "/gradio_api/info").json()
    assert offered == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_a_body_has_a_length_and_a_limit(url: str) -> None:
    assert httpx.post(url + "/gradio_api/queue/join", content=b"x" * (4 * 2**20 + 1)).status_code == 413
    assert httpx.post(url + "/gradio_api/queue/join", content=iter([b"x"])).status_code == 413


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
    ],
)
def test_another_site_cannot_send_its_visitors_here(headers: dict[str, str], url: str) -> None:
    assert httpx.get(url, headers=headers).status_code == 403
    assert httpx.post(url + "/gradio_api/queue/join", headers=headers, json={}).status_code == 403


def test_with_a_password_nothing_is_told_before_it(guarded_url: str) -> None:
    with httpx.Client(base_url=guarded_url) as client:
        assert "auth_required" in client.get("/").text and "thought-budget" not in client.get("/").text
        join = {"data": [], "fn_index": 0, "session_hash": "abc"}
        assert client.post("/gradio_api/queue/join", json=join).status_code == 401
        assert client.get("/config").status_code == 401
        assert client.post("/login", data={"username": "a", "password": "wrong horse"}).status_code == 400
        assert client.post("/login", data={"username": "a", "password": "correct horse"}).status_code == 200
        assert "thought-budget" in client.get("/").text


def test_a_port_that_is_taken_is_told_in_one_sentence() -> None:
    taken, is_loopback = listen("localhost", 0)
    with taken:
        assert is_loopback
        with pytest.raises(MedcotError, match=r"Port \d+ of 127.0.0.1 cannot be taken .*: name another with --port"):
            listen("127.0.0.1", taken.getsockname()[1])


def test_a_host_that_is_none() -> None:
    with pytest.raises(MedcotError, match=r"There is no host 'no\.such\.host\.invalid'"):
        listen("no.such.host.invalid", 0)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_are_let_in_with_a_password_only(host: str) -> None:
    if host == "::" and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    with pytest.raises(MedcotError, match="can be reached by others, so it needs a password"):
        serve([Path("unread.gguf")], host=host, port=0)
    with pytest.raises(MedcotError, match=r"unread\.gguf does not exist"):
        serve([Path("unread.gguf")], host=host, port=0, password="correct horse")


def test_a_short_password_is_refused() -> None:
    with pytest.raises(MedcotError, match="has 7 characters: take 8 or more"):
        serve([Path("unread.gguf")], host="0.0.0.0", port=0, password="1234567")


def test_a_password_is_asked_for_or_taken_from_the_environment() -> None:
    command = ["serve", "unread.gguf", "--host", "0.0.0.0", "--port", "0"]
    typed = CliRunner().invoke(cli, [*command, "--password"], input="correct horse\ncorrect horse\n")
    set_before = CliRunner().invoke(cli, command, env={"MEDCOT_PASSWORD": "correct horse"})
    assert "correct horse" not in typed.output
    for outcome in (typed, set_before):
        assert "unread.gguf does not exist" in str(outcome.exception)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from pipeline.cli import cli;"
        "assert 'Example: medcot serve' in CliRunner().invoke(cli, ['serve', 'x.gguf', '--help']).output;"
        "heavy = {'gradio', 'numpy', 'pydantic', 'llama_cpp', 'chat', 'uvicorn'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_three_models_are_too_many() -> None:
    with pytest.raises(MedcotError, match="two side by side, not 3"):
        serve([Path("unread.gguf")] * 3, port=0)


@pytest.mark.broad
def test_the_command_serves_until_interrupted_without_pytorch(tmp_path: Path) -> None:
    """Where PyTorch cannot be imported, and with a page still open."""
    (tmp_path / "torch.py").write_text("raise ImportError('the page must not import PyTorch')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "XDG_CACHE_HOME": str(tmp_path)}
    medcot = [sys.executable, "-m", "pipeline.cli"]
    command = [*medcot, "serve", str(small_model()), "--port", "0", "--threads", "1", "--json"]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        ready = json.loads(child.stdout.readline())
        assert ready["models"] == ["SmolLM2-135M-Instruct.Q4_1"]
        with httpx.stream("GET", ready["url"] + "/gradio_api/heartbeat/abc", timeout=60) as heartbeat:
            assert next(heartbeat.iter_lines()) == "data: ALIVE"
            child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=30)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 0
    assert re.fullmatch(r"(Checking .* new here \.\.\.\n)?", errors)
