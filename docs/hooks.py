"""What the site of mkdocs.yml needs besides Markdown: pages for files outside docs/, equations, examples as code."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(?=[)#])")
MATH = re.compile(r"(?P<code>```.*?```|`[^`\n]*`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+?)\$", re.DOTALL)
TITLES = {".py": "python", ".yaml": "yaml"}


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file or folder of the repository that pages link to, so that the links work on the site."""
    pages = [file.src_uri for file in files.documentation_pages()]
    waiting = [
        target for page in pages for target in _targets(f"docs/{page}", files.get_file_from_path(page).content_string)
    ]
    done: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in done or path.startswith("docs/"):
            continue
        done.add(path)
        content = _content(path)
        files.append(File.generated(config, _uri(path), content=content))
        waiting += [] if path.endswith((".py", ".yaml")) else _targets(path, content)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to the pages of `on_files`, and write equations as MathML, which browsers draw without a library."""
    home = _path(page.file.src_uri)
    if home.endswith((".py", ".yaml")):
        return markdown
    return MATH.sub(_equation, LINK.sub(lambda link: _relative(link[1], home, page.file.src_uri), markdown))


class Examples(griffe.Extension):
    """Marks the examples of docstrings, which are indented or begin with >>>, as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a class or function."""
        if obj.docstring:
            text = re.sub(
                r" ?::\n\n(?= {4})", lambda mark: mark[0].replace("::", ":").replace(" :", ""), obj.docstring.value
            )
            obj.docstring.value = re.sub(
                r"(?m)^>>> (?:.+\n?)+", lambda code: f"```pycon\n{code[0].rstrip()}\n```\n", text
            )


def _targets(path: str, text: str) -> list[str]:
    return [posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in LINK.findall(text)]


def _relative(link: str, home: str, uri: str) -> str:
    (target,) = _targets(home, f"]({link})")
    return posixpath.relpath(_uri(target), posixpath.dirname(uri))


def _uri(path: str) -> str:
    """Return the page of the site for a path of the repository, and the other way round in `_path`."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}.md"


def _path(uri: str) -> str:
    return uri.removeprefix("repository/").removesuffix(".md") if uri.startswith("repository/") else f"docs/{uri}"


def _content(path: str) -> str:
    file = ROOT / path
    if file.is_dir():
        entries = sorted(
            entry.name for entry in file.iterdir() if entry.suffix in TITLES and entry.name != "__init__.py"
        )
        return "\n".join((f"# {path}", "", *(f"- [{name}]({file.name}/{name})" for name in entries)))
    text = file.read_text(encoding="utf-8")
    if file.suffix not in TITLES:
        return text
    return f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n````{TITLES[file.suffix]}\n{text}\n````\n"


def _equation(found: re.Match[str]) -> str:
    if found["code"]:
        return found["code"]
    if found["block"]:
        return convert(found["block"], display="block")
    return f"<span>{convert(found['inline'])}</span>"  # in a line of text, which Markdown must not take for a block
