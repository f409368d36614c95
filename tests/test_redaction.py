"""Secrets in URLs: refused where they are given, blotted out where they are shown."""

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from eqm_dist import cli
from eqm_dist.config import Config
from eqm_dist.errors import ConfigError, StorageError
from eqm_dist.logs import setup_logging
from eqm_dist.options import options, with_overrides
from eqm_dist.presets import digits
from eqm_dist.redaction import holds_secret, redacted
from tests import commands, tiny

SECRETS = [
    "http://T0KEN@host/x",
    "https://me:T0KEN@host:8080/x",
    "https://me:T0/KEN@host/x",
    "https://host/x?token=T0KEN",
    "s3://KEY:T0KEN@bucket/shards",
    "postgresql+psycopg2://me:T0KEN@host/db",
]


@pytest.mark.parametrize("url", SECRETS)
def test_secrets_are_seen_and_blotted_out(url: str) -> None:
    assert holds_secret(url)
    assert "T0" not in redacted(f"the store '{url}' must answer, but {url} did not; see http://docs/x")
    error = StorageError(f"S3 at {url} is away")
    assert "T0" not in str(error)
    assert "T0" not in str(pickle.loads(pickle.dumps(error)))


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/a@b", "a@b", "what?", "/data/what?/x", "stabilityai/vae@main", "http://h:80/x", "sqlite:////a/b.db",
     "see http://h:8080/a; mail me@host"],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize("url", SECRETS)
def test_every_option_that_takes_text_refuses_them(url: str, tmp_path: Path) -> None:
    texts = [option.key for option in options(Config) if option.type_name == "STR"]
    assert {"data.shards", "checkpoint.mirror", "track.mlflow_uri", "run.root"} <= set(texts)
    file = tmp_path / "mine.yaml"
    for key in texts:
        with pytest.raises(ConfigError) as error:
            with_overrides(digits(), {key: url})
        assert "T0" not in str(error.value)
        section, _, name = key.partition(".")
        file.write_text(yaml.safe_dump({section: {name: url}}))
        ended = tiny.train("--config", str(file), "--dry-run")
        assert (ended.code, "T0" in ended.err) == (2, False), key
    with pytest.raises(ConfigError, match="must not hold a user"):
        with_overrides(digits(), {"data.mix": [{"shards": url}]})


@pytest.mark.parametrize(("name", "parser"), commands.parsers())
def test_every_flag_of_every_command_refuses_them(name: str, parser: Any) -> None:
    for line in commands.with_text(parser, SECRETS[0]):
        with pytest.raises(ConfigError, match="must not hold a user, a password or a query") as error:
            parser.parse_args(line)
        assert "T0" not in str(error.value)
    for line in commands.with_text(parser, "caf\udce9"):
        with pytest.raises(ConfigError, match=r"must be text in UTF-8, got caf\\xe9; rename"):
            parser.parse_args(line)


def test_the_log_shows_none(tmp_path: Path) -> None:
    package = logging.getLogger("eqm_dist")
    before = package.handlers, package.level, package.propagate
    package.handlers = []
    setup_logging(tmp_path / "log", console=False)
    logging.getLogger("eqm_dist.x").warning("copying failed: %s", OSError(f'no endpoint "{SECRETS[1]}"'))
    package.handlers[0].close()
    package.handlers, package.level, package.propagate = before
    assert "T0" not in (tmp_path / "log").read_text()


def test_even_a_fault_of_ours_shows_none(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: object) -> None:
        raise RuntimeError(f"at {SECRETS[0]}")

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    shown = capsys.readouterr().err
    assert (ended.value.code, "T0" in shown, "http://***@host" in shown) == (1, False, True)
