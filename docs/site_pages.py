"""What `mkdocs` puts on the site: the repository's documents in their places, and pages made from the code.

The reference of commands is what the commands say of themselves, that of Python what docstrings say. A page
in the place of each folder lists what is in it. Nothing is written into the repository.
"""

import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import posae.pipeline
import posae.store

ROOT = Path(__file__).parents[1]
SHOWN = (
    "*.md",
    "LICENSE",
    "CITATION.cff",
    "docs/**/*.md",
    "docs/*.json",
    "examples/**/*.md",
    "examples/**/*.toml",
    "examples/*.py",
)
FOLDERS = {"docs/decisions": "Decisions", "examples": "Examples", "examples/paper": "The paper's sweeps"}
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)([^)\s]*)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the documents where they lie in the repository, and the pages that are made beside them."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in sorted({found.relative_to(ROOT) for pattern in SHOWN for found in ROOT.glob(pattern)}):
        files.append(File(path.as_posix(), str(ROOT), config.site_dir, config.use_directory_urls))
    for path, text in made():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Read what GitHub reads: a link to a folder, and lists whose items go on three spaces in."""
    here = posixpath.dirname(page.file.src_uri)

    def to_page(found: re.Match[str]) -> str:
        is_folder = posixpath.normpath(posixpath.join(here, found[1])) in FOLDERS
        return f"]({found[1].rstrip('/')}/index.md{found[2]})" if is_folder else found[0]

    return re.sub(r"^ {3}(?=\S)", " " * 4, LINK.sub(to_page, markdown), flags=re.MULTILINE)


def made() -> Iterator[tuple[str, str]]:
    """Path and Markdown of each page that is made from the code."""
    yield "commands.md", commands()
    for module in (posae.store, posae.pipeline):
        name = module.__name__
        parts = [f"# {name}", module.__doc__ or "", *(f"::: {name}.{public}" for public in module.__all__)]
        yield f"api/{name.removeprefix('posae.')}.md", "\n\n".join(parts)
    yield "api/errors.md", "# Errors\n\n::: posae.store.errors\n    options: {show_root_heading: false}\n"
    for folder, title in FOLDERS.items():
        names = sorted(path.name for path in (ROOT / folder).iterdir() if path.is_file())
        names += [
            f"{other.rpartition('/')[2]}/index.md" for other in FOLDERS if posixpath.dirname(other) == folder
        ]
        yield f"{folder}/index.md", "\n".join([f"# {title}", "", *(f"- [{name}]({name})" for name in names)])


def commands() -> str:
    """What every command says of itself; typer's own tool writes it, cut short in the list at its top."""
    words = [
        sys.executable,
        "-m",
        "typer",
        "posae.cli.app",
        "utils",
        "docs",
        "--name",
        "posae",
        "--title",
        "Commands",
    ]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    said = re.sub(r"^\*\*Commands\*\*:\n\n(\* .*\n)+", "", said, count=1, flags=re.MULTILINE)
    return re.sub(r'<span style="[^"]*">(.*?)</span>', r"\1", said)
