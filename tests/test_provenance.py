"""The commit in a record is that of the code, and asking for it runs nothing that a repository names."""

import os
import subprocess
from pathlib import Path

import pytest

from eqm_dist import provenance


def git(root: Path, *arguments: str) -> str:
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@a",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@a",
    }
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True,
                          env={**os.environ, **identity})  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the package in its root."""
    root = tmp_path / "check out"
    (root / "eqm_dist").mkdir(parents=True)
    (root / "eqm_dist" / "provenance.py").write_text("x = 1\n")
    (root / ".gitattributes").write_text("*.py filter=theirs\n")
    (root / ".gitignore").write_text("ignored\n")
    (root / "ignored").touch()
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    monkeypatch.setattr(provenance, "__file__", str(root / "eqm_dist" / "provenance.py"))
    return root


def commit() -> str | None:
    return provenance.provenance()["commit"]


def test_the_commit_and_whether_the_tree_differs(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert commit() == head
    git(checkout, "pack-refs", "--all")
    assert commit() == head
    git(checkout, "checkout", "-q", "--detach")
    assert commit() == head
    (checkout / ".git" / "info" / "exclude").write_text("mine\n")
    (checkout / "mine").touch()
    assert commit() == head
    (checkout / "eqm_dist" / "provenance.py").write_text("x = 2\n")
    assert commit() == f"{head}+changes"


def test_of_a_worktree_too(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "tree"
    git(checkout, "worktree", "add", "-q", "-b", "other", str(tree))
    monkeypatch.setattr(provenance, "__file__", str(tree / "eqm_dist" / "provenance.py"))
    assert commit() == git(tree, "rev-parse", "HEAD")
    (tree / "new.py").touch()
    assert commit() == f"{git(tree, 'rev-parse', 'HEAD')}+changes"


def test_no_program_of_the_repository_runs(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "theirs"
    program.write_text(f"#!/bin/sh\ntouch '{tmp_path / 'PWNED'}'\ncat\n")
    program.chmod(0o755)
    head = git(checkout, "rev-parse", "HEAD")
    for key in ("core.fsmonitor", "filter.theirs.clean", "filter.theirs.process", "core.sshCommand", "core.pager",
                "diff.external", "core.editor"):  # fmt: skip
        git(checkout, "config", key, str(program))
    for hook in ("post-index-change", "fsmonitor-watchman", "post-checkout"):
        (checkout / ".git" / "hooks").mkdir(exist_ok=True)
        (checkout / ".git" / "hooks" / hook).symlink_to(program)
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", str(program))
    os.utime(checkout / "eqm_dist" / "provenance.py", (1, 1))  # so that its content has to be looked at
    before = (checkout / ".git" / "index").read_bytes()
    assert commit() == head
    assert not (tmp_path / "PWNED").exists()
    assert (checkout / ".git" / "index").read_bytes() == before


def test_a_repository_around_an_installed_package_is_not_the_codes(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = checkout / ".venv" / "lib" / "site-packages" / "eqm_dist"
    installed.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(installed / "provenance.py"))
    monkeypatch.chdir(checkout)
    assert commit() is None


def test_without_git_the_commit_is_known_all_the_same(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("PATH", "")
    assert commit() == f"{head}+unknown"


def test_before_the_first_commit_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "eqm_dist" / "provenance.py"))
    assert commit() is None
