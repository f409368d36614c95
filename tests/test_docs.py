"""What the pages promise: links and anchors that lead somewhere, code that compiles, commands and flags that exist."""

import argparse
import importlib
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from docs import options_page, performance_page
from docs.build_site import broken_links
from eqm_dist import cli
from eqm_dist.__main__ import COMMANDS
from eqm_dist.errors import ConfigError

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "cluster" / "README.md",
    ROOT / "tests" / "golden" / "README.md",
]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))

of_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


# --- links ---


def prose(text: str) -> str:
    """A page without its blocks and inline code, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ +(.*?) *$", text, flags=re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = found.get(slug, 0)
        found[slug] = number + 1
        if number:
            found[f"{slug}-{number}"] = 1
    return set(found)


def broken(page: Path) -> list[str]:
    """The links of a page to other files and to anchors that are not there."""
    wrong: list[str] = []
    for link in re.findall(r"\[[^]]*\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" in link or link.startswith("mailto:"):
            continue
        if not target.exists() or (anchor and (target.suffix != ".md" or anchor not in anchors(target))):
            wrong.append(link)
    return wrong


@of_every_page
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_wrong_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One `two`: three-four\n\n## Same\n\n## Same\n", encoding="utf-8")
    page = tmp_path / "page.md"
    good = [
        "other.md",
        "other.md#one-two-three-four",
        "other.md#same",
        "other.md#same-1",
        "#here",
        "https://a.example/x",
    ]
    bad = ["none.md", "other.md#same-2", "other.md#Same", "#there", "none/"]
    links = "\n".join(f"[text]({link})" for link in [*good, *bad])
    page.write_text(f"# Here\n\n{links}\n\n```\nweights[0](1)\n```\n", encoding="utf-8")
    assert broken(page) == bad


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name == "README.md" or re.search(rf"\]\({re.escape(name)}[#)]", index), f"docs/README.md lacks {name}"


def test_the_site_is_checked_for_images_and_anchors(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<h1 id="x"></h1><a href="b.html#y"></a><a href="#x"></a><img src="i.png">')
    (tmp_path / "b.html").write_text('<a href="a.html#none"></a><a href="https://a.example"></a><a href="c.html"></a>')
    assert sorted(broken_links(tmp_path)) == [
        "a.html: b.html#y",
        "a.html: i.png",
        "b.html: a.html#none",
        "b.html: c.html",
    ]


# --- blocks ---


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language; of none: shell commands and what they print."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


@of_every_page
def test_code_compiles_and_yaml_parses(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
    for block in blocks(page, "yaml"):
        assert yaml.safe_load(block) is not None


def test_there_are_blocks_of_every_kind() -> None:
    for language in ("", "python", "yaml"):
        assert any(blocks(page, language) for page in PAGES)


# --- commands ---

PROGRAM = re.compile(
    r"(?:^|(?<=[\s\"(]))(?:make (?=[a-z])|eqm-dist (?=[a-z-])"
    r"|python (?P<script>(?:pipelines|tuning|cluster|benchmarks|docs)/\w+\.py)"
    r"|python -m (?P<module>(?:cluster|benchmarks|eqm_dist)(?:\.\w+)*))"
)
END = re.compile(r"\s#|\s\.\.\.|[;&|>`]|\)\"|\s\(|\s{3,}")
"""What ends the arguments of a command: a comment, another command, or words beside it."""

Command = tuple[str, list[str]]


class Parsed(Exception):
    """Raised where a program has parsed its command line, before it does anything."""


def commands_in(text: str) -> Iterator[Command]:
    """The commands of a text that are ours: ``make``, ``eqm-dist`` or the program's file, and the arguments."""
    for line in text.replace("\\\n", " ").splitlines():
        for match in PROGRAM.finditer(line):
            program = match["script"] or match[0].strip()
            if module := match["module"]:
                path = module.replace(".", "/")
                program = f"{path}/__main__.py" if (ROOT / path).is_dir() else f"{path}.py"
            yield program, shlex.split(END.split(line[match.end() :])[0])


def check(program: str, arguments: list[str], whole: bool = True) -> None:
    """Parse a command's arguments with its own parser; a ``whole`` command lacks nothing, and its values are right.

    Raises:
        ConfigError: there is no such program, target, flag or value.
    """
    whole = whole and "--help" not in arguments
    arguments = [argument for argument in arguments if argument != "--help"]
    if program == "make":
        unknown = [word for word in arguments if "=" not in word and word not in TARGETS]
        if unknown:
            raise ConfigError(f"make has no target {unknown[0]}.")
        return
    if program in ("eqm-dist", "eqm_dist/__main__.py"):
        if arguments in ([], ["--version"]):
            return
        name, *arguments = arguments
        if name not in COMMANDS:
            raise ConfigError(f"eqm-dist has no command {name}.")
        program = f"eqm_dist/commands/{name.replace('-', '_')}.py"
    if not (ROOT / program).is_file():
        raise ConfigError(f"{program} does not exist.")
    path = re.sub(r"^(pipelines|tuning)/", "eqm_dist/commands/", program)
    module: Any = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    if hasattr(module, "make_parser"):
        action = ["prepare"]
        if program.endswith("/prepare_shards.py") and arguments[:1] and arguments[0] in module.COMMANDS:
            action, arguments = arguments[:1], arguments[1:]
        parser = module.make_parser(*action) if program.endswith("/prepare_shards.py") else module.make_parser()
        parsed = relaxed(parser, whole).parse_args(arguments)
        if whole and hasattr(parsed, "preset"):
            cli.config_from(argparse.Namespace(**{**vars(parsed), "config": None}))
    else:
        parse_in_main(module, arguments, whole)


def relaxed(parser: argparse.ArgumentParser, whole: bool) -> argparse.ArgumentParser:
    """The parser; where a command is not ``whole``, it requires nothing and takes any value."""
    for action in parser._actions if not whole else ():
        action.required = False
        if not isinstance(action, argparse._SubParsersAction):
            action.choices = action.type = None
    return parser


def parse_in_main(module: Any, arguments: list[str], whole: bool) -> None:
    """Let a program parse that makes its parser in ``main``, and stop it there."""

    def stopping(parse_args: Callable[..., argparse.Namespace]) -> Callable[..., NoReturn]:
        def parse_and_stop(parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
            parse_args(relaxed(parser, whole), *given)
            raise Parsed

        return parse_and_stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [module.__name__, *arguments])
        for kind in (argparse.ArgumentParser, type(cli.command_parser(None))):
            patch.setattr(kind, "parse_args", stopping(kind.parse_args))
        with pytest.raises(Parsed):
            module.main(arguments) if inspect.signature(module.main).parameters else module.main()


def refusals(page: Path) -> list[str]:
    """The commands of a page that cannot be given as they stand, each with the reason."""
    text = page.read_text(encoding="utf-8")
    # In a block a command is whole. In a sentence it may be shortened: `--objective.decay.family NAME`.
    found = [(command, True) for block in blocks(page, "") for command in commands_in(block)]
    in_prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    found += [(command, False) for code in re.findall(r"`([^`]+)`", in_prose) for command in commands_in(code)]
    wrong: list[str] = []
    for (program, arguments), whole in found:
        try:
            check(program, arguments, whole)
        except ConfigError as error:
            wrong.append(f"{program} {shlex.join(arguments)}: {error}")
        except SystemExit:
            wrong.append(f"{program} {shlex.join(arguments)}: see above")
    return wrong


@of_every_page
def test_every_command_can_be_given(page: Path) -> None:
    assert refusals(page) == []


def test_the_pages_have_commands_of_every_kind() -> None:
    programs = {program for page in PAGES for block in blocks(page, "") for program, _ in commands_in(block)}
    expected = {"make", "eqm-dist", "pipelines/train.py", "tuning/sweep_decay.py", "cluster/lab/__main__.py"}
    assert expected <= programs
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "pipelines").glob("*.py")} <= programs


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("make trian", "make has no target trian."),
        ("source x && make test lnit  # twice", "make has no target lnit."),
        ("eqm-dist trian --dry-run", "eqm-dist has no command trian."),
        ("python pipelines/trian.py", "pipelines/trian.py does not exist."),
        ("ray job submit -- \\\n    python pipelines/train.py --train.step 5", "--train.step is not an option"),
        ("eqm-dist train --train.steps few", "train.steps: should be a valid integer"),
        ("python pipelines/sample.py --out a --samples many", "Argument --samples: must be a whole number"),
        ("python pipelines/prepare_shards.py verify data/mine --mirror", "--mirror is not an option"),
        ("python pipelines/checkpoint.py lss runs/mine", "invalid choice: 'lss'"),
        ('eval "$(python -m cluster.lab environment)"', "Argument "),
        ("python -m cluster.lab.none", "cluster/lab/none.py does not exist."),
        ("python -m benchmarks.bench_save --sise B", "see above"),
    ],
)
def test_a_wrong_command_is_found(line: str, sentence: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n```\n{line}\n```\n", encoding="utf-8")
    (refusal,) = refusals(page)
    assert sentence in refusal


# --- what is generated ---


def test_the_list_of_options_is_that_of_the_code() -> None:
    text = options_page.PAGE.read_text(encoding="utf-8")
    assert text == options_page.page(), "run: python docs/options_page.py"


def test_the_page_of_performance_is_that_of_the_records() -> None:
    text = performance_page.PAGE.read_text(encoding="utf-8")
    assert text == performance_page.page(), "run: python docs/performance_page.py"
