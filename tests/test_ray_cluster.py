"""A cluster is the one that RAY_ADDRESS names, or a local one that nobody else on the machine can look into."""

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eqm_dist.errors import LaunchError
from eqm_dist.launch import ray_cluster
from eqm_dist.launch.ray_actors import _divide, _Share


@pytest.mark.parametrize("address", ["http://head:8265", "head", "nonsense:::", "head:port", "https://u:secret@head:1"])
def test_what_is_no_address_is_one_sentence(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(LaunchError, match=r"^RAY_ADDRESS must be HOST:PORT of") as raised, ray_cluster.cluster():
        pass
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "nowhere.invalid:6379", "127.0.0.1:99999"])
def test_an_address_where_no_cluster_answers_is_one_sentence(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        pytest.raises(LaunchError, match=r"^RAY_ADDRESS must name a Ray cluster that answers") as raised,
        ray_cluster.cluster(),
    ):
        pass
    assert "\n" not in str(raised.value)


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The record of a cluster, where Ray looks for it; somebody listens at its address."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        file.write_text(f"127.0.0.1:{listener.getsockname()[1]}\n")
        yield file


def test_a_cluster_of_this_user_is_found(record: Path) -> None:
    assert ray_cluster._own_cluster() == record.read_text().strip()
    record.write_text("10.0.0.1:6379")  # on a worker node, the head is elsewhere
    assert ray_cluster._own_cluster() == "10.0.0.1:6379"
    record.unlink()
    assert ray_cluster._own_cluster() is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can write in another's name")
def test_a_cluster_that_another_user_recorded_is_not_joined(
    record: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    os.chown(record, 12345, 12345)
    assert ray_cluster._own_cluster() is None
    assert "is another user's and not joined; RAY_ADDRESS can name it" in caplog.text
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(LaunchError, match=r"^RAY_ADDRESS=auto must find a cluster that you have started"):
        ray_cluster._join("auto")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can listen in another's name")
def test_a_stale_record_at_whose_port_another_user_listens_is_not_joined(record: Path) -> None:
    listen = "import os, socket; os.setuid(12345); s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); "
    listen += "print(s.getsockname()[1], flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", listen], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        record.write_text(f"127.0.0.1:{other.stdout.readline().strip()}")
        assert ray_cluster._own_cluster() is None
        other.communicate("\n")


def test_a_record_that_is_a_link_or_a_pipe_is_none(record: Path, tmp_path: Path) -> None:
    record.rename(tmp_path / "elsewhere")
    record.symlink_to(tmp_path / "elsewhere")
    assert ray_cluster._own_cluster() is None
    record.unlink()
    os.mkfifo(record)
    assert ray_cluster._own_cluster() is None


def test_a_start_that_ray_gives_up_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray gives up with ``Exception`` itself, here because the names of its sockets would be too long."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with (
        pytest.raises(LaunchError, match=r"^Ray must start on this machine, but did not") as raised,
        ray_cluster.cluster(),
    ):
        pass
    assert "\n" not in str(raised.value)


def test_the_token_of_the_home_is_for_nobody_else_to_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0" * 64, encoding="utf-8")
    token.chmod(0o644)
    ray_cluster._keep_token_private()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert "RAY_AUTH_TOKEN" not in os.environ


LOOK = """
import json, os, psutil, ray
from pathlib import Path
from eqm_dist.launch.ray_actors import _divide, _Share
from eqm_dist.launch.ray_cluster import cluster

with cluster():
    ray.get(ray.remote(lambda: None).remote())
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    sockets = [socket for process in processes for socket in process.net_connections("tcp")]
    private = Path(ray._private.worker._global_node.get_temp_dir_path()).parent
    print(json.dumps({
        "names": sorted({process.name() for process in processes}),
        "listening": sorted({socket.laddr.ip for socket in sockets if socket.status == "LISTEN"}),
        "private": str(private), "mode": oct(private.stat().st_mode & 0o777),
    }))
"""


@pytest.mark.multiprocess
def test_a_local_cluster_is_nobody_elses(tmp_path: Path) -> None:
    """Also for a user without a home, who has no token of Ray's."""
    environment = {**os.environ, "RAY_ADDRESS": "local", "HOME": str(tmp_path / "none")}
    ended = subprocess.run(
        [sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert ended.returncode == 0, ended.stderr
    seen = json.loads(ended.stdout)
    assert {"gcs_server", "raylet"} <= set(seen["names"])
    assert set(seen["listening"]) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert seen["mode"] == "0o700"
    assert not Path(seen["private"]).exists()
    assert not (tmp_path / "none").exists()


def test_no_actor_waits_for_a_cpu_that_nobody_has() -> None:
    assert _divide([{"CPU": 1.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}]) == (3, _Share(1, 1))
    assert _divide([{"CPU": 8.0, "GPU": 2.0}]) == (2, _Share(4, 1))
    assert _divide([{"CPU": 3.0}, {}]) == (3, _Share(1, 0))
    for nodes in ([], [{"CPU": 0.0}], [{"GPU": 1.0}]):
        with pytest.raises(LaunchError, match="The cluster must have a CPU for an actor"):
            _divide(nodes)
