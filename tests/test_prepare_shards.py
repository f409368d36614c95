"""The command that prepares and verifies shards."""

import subprocess
import sys
from pathlib import Path

import pytest

from eqm_dist.data.manifest import read_manifest
from eqm_dist.errors import ConfigError, DataError, StorageError
from pipelines.prepare_shards import main

SCRIPT = Path(__file__).parents[1] / "pipelines" / "prepare_shards.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)


def test_prepares_then_verifies_then_names_the_damage(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    prepared = run("--source", "digits", "--out", str(out), "--samples-per-shard", "600", "--dtype", "float16")
    assert prepared.returncode == 0, prepared.stderr
    assert "Wrote digits-000001.tar: 1,200 of 1,797 images" in prepared.stdout
    assert f"{out} holds 1,797 samples in 3 shards." in prepared.stdout
    assert prepared.stderr == ""
    assert read_manifest(out).dtype == "float16"

    shard = out / "digits-000001.tar"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    verified = run("verify", str(out))
    assert verified.returncode == 2
    assert verified.stderr.startswith(f"error: {shard} must have the sha256")
    assert verified.stderr.count("\n") == 1


def test_verify_accepts_a_whole_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--source", "digits", "--out", str(tmp_path), "--mirror"])
    assert read_manifest(tmp_path).moments_shape == (2, 2, 8, 8)
    main(["verify", str(tmp_path)])
    assert "is whole: 1,797 samples in 8 shards." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (["verify", "/nowhere"], DataError, "/nowhere does not exist; prepare one with"),
        (["--source", "digits", "--out", "s3://bucket/x"], DataError, "must be a local path, received the s3: URL"),
        (["--source", "digits", "--out", "x", "--samples-per-shard", "0"], DataError, "must be at least 1, received 0"),
        (["--source", "digits", "--out", "/dev/null/x"], StorageError, "Cannot create /dev/null/x: Not a directory"),
        (["--source", "digits"], ConfigError, "--source and --out must be given"),
        ([], ConfigError, "--source and --out must be given"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence) as raised:
        main(arguments)
    assert "\n" not in str(raised.value)


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{str(SCRIPT)!r}, '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as exit_: assert exit_.code == 0\n"
        "heavy = {'torch', 'numpy', 'sklearn', 'webdataset', 'ray', 'mlflow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    assert "--samples-per-shard" in finished.stdout
