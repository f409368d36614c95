"""Build the documentation site: lay out its pages, run the generator, and check every link of what it wrote.

python docs/build_site.py OUT    writes OUT/pages, OUT/mkdocs.yml and the site itself, OUT/site/index.html

The pages lie as in the repository, so that links between them are the same in both. A link to a file that is no page of
the site becomes plain text; tests/test_docs.py holds that such a file exists.
"""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).parent.parent
PROJECT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "cluster/README.md")
PUBLIC = (
    "eqm_dist",
    "eqm_dist.pretrained",
    "eqm_dist.core",
    "eqm_dist.models",
    "eqm_dist.data",
    "eqm_dist.data.sources",
)
"""What the reference shows: these modules, and the modules in those of them that are packages."""

Navigation = list[dict[str, Any]]


def main(out: Path) -> None:
    """Build the site in ``out``, which is made anew."""
    shutil.rmtree(out, ignore_errors=True)
    pages = out / "pages"
    shutil.copytree(ROOT / "docs" / "images", pages / "docs" / "images")
    documents = [*(ROOT / name for name in PROJECT), *sorted((ROOT / "docs").rglob("*.md"))]
    names = {document.relative_to(ROOT).as_posix() for document in documents}
    for name in sorted(names):
        target = pages / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_with_links_inside((ROOT / name).read_text(encoding="utf-8"), name, names), encoding="utf-8")

    def of_folder(folder: str) -> Navigation:
        found = [name for name in sorted(names) if str(PurePosixPath(name).parent) == folder]
        return [{_title(ROOT / name): name} for name in found if not name.endswith("README.md")]

    navigation: Navigation = [
        {"eqm-dist": "README.md"},
        {"Documentation": ["docs/README.md", *of_folder("docs")]},
        {"Reference": _reference(pages)},
        {"Decisions": of_folder("docs/decisions")},
        {"Project": [{_title(ROOT / name): name} for name in PROJECT[1:]]},
    ]
    settings = (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8")
    (out / "mkdocs.yml").write_text(settings + yaml.safe_dump({"nav": navigation}, sort_keys=False), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=out)
    if done.returncode != 0:
        sys.exit(done.returncode)
    broken = broken_links(out / "site")
    if broken:
        print("\n".join(("These links of the site lead nowhere:", *broken)), file=sys.stderr)
        sys.exit(1)
    print(f"The site is {out / 'site' / 'index.html'}")


def broken_links(site: Path) -> list[str]:
    """Links without a file or an anchor; the generator looks at those between pages, not at images and navigation."""
    pages = {path: _Page(path) for path in sorted(site.rglob("*.html"))}
    broken: list[str] = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":  # the latter's links begin at a server's root
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchored = not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].anchors
            if not target.is_file() or not anchored:
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


class _Page(HTMLParser):
    """The links and anchors of a built page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.links.update(values[name] for name in ("href", "src") if name in values)
        self.anchors.update(values[name] for name in ("id", "name") if name in values)


def _title(page: Path) -> str:
    """The first heading, in which there is no markup."""
    return page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").replace("`", "")


def _with_links_inside(text: str, name: str, names: set[str]) -> str:
    """The page without its links to files that are not on the site."""

    def kept(link: re.Match[str]) -> str:
        target = link[2].partition("#")[0]
        if "://" in target or not target or target.endswith((".png", ".gif")):
            return link[0]
        path = (ROOT / name).parent.joinpath(target).resolve()
        inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).as_posix() in names
        return link[0] if inside or not path.exists() else link[1]

    return re.sub(r"(?<!!)\[([^]]*)\]\(([^)\s]+)\)", kept, text)


def _reference(pages: Path) -> Navigation:
    """Write one page for each public module, and one that lists them."""
    folder = pages / "reference"
    folder.mkdir()
    navigation: Navigation = []
    for name in PUBLIC:
        path = ROOT / name.replace(".", "/")
        inner = sorted(path.glob("[!_]*.py")) if path.is_dir() and name != "eqm_dist" else []
        modules = [name, *(f"{name}.{file.stem}" for file in inner)]
        for module in modules:
            text = f"# {module}\n\n::: {module}\n    options: {{show_root_heading: false}}\n"
            (folder / f"{module}.md").write_text(text, encoding="utf-8")
        entries = [{module.removeprefix(f"{name}."): f"reference/{module}.md"} for module in modules]
        navigation += [{name: entries}] if len(entries) > 1 else entries
    return navigation


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
