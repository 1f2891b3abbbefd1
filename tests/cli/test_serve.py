"""kmixer serve: what it refuses before it listens."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.cli.conftest import Run


def test_addresses_of_others_need_a_key(kmixer_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KMIXER_API_KEY", raising=False)
    error = kmixer_command("serve", "shakespeare-small", "--host", "0.0.0.0").error()
    assert error.startswith("error: --host 0.0.0.0: others could use this server; give a key by --api-key-file FILE")
    (tmp_path / "key").write_text("a b\n")
    error = kmixer_command("serve", "shakespeare-small", "--api-key-file", tmp_path / "key").error()
    assert error.startswith("error: the key: allowed are 8 to 512 letters")
    assert "a b" not in error
    assert "is missing" in kmixer_command("serve", "shakespeare-small", "--api-key-file", tmp_path / "none").error()


def test_what_cannot_be_served_is_named(kmixer_command: Run) -> None:
    pytest.importorskip("uvicorn", reason="kmixer[serve] is not installed")
    assert "is not a run or model folder" in kmixer_command("serve", "nowhere").error()
    assert (
        "--max-body: got '1 MB'; allowed: a number and " in kmixer_command("serve", "x", "--max-body", "1 MB").error()
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = kmixer_command("serve", "shakespeare-small", "--port", port).error()
    assert error.startswith(f"error: cannot listen on 127.0.0.1 port {port} (Address already in use); choose another")
