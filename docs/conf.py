"""How the documentation is built: ``sphinx-build -W --keep-going -n docs docs/_build``.

Rule 1: no network. Names of Python, anyio and pydantic are shown, and not linked.
Rule 2: a page reads as well on a code host. So the pages are plain Markdown, whose links between files are followed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, Final

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import PycodeError
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.nodes import make_refnode

HERE: Final = Path(__file__).parent
FOREIGN: Final = ("anyio", "asyncio", "dataclasses", "pydantic", "trio")

_SECTION: Final = re.compile(r"(Args|Attributes|Returns|Raises|Yields):")

project = "Towline"
version = release = version_of("towline")
copyright = "the Towline authors, under Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
root_doc = "index"
nitpicky = True
default_role = "py:obj"  # what docstrings put into `single` backticks

html_theme = "furo"
html_title = "Towline"
html_static_path: list[str] = []
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has them
python_maximum_signature_line_length = 90
python_use_unqualified_type_names = True


def _suffixes(env: BuildEnvironment) -> dict[str, str]:
    """Every documented name, by its last one and two parts: docstrings say `Retry`, wherever it is documented."""
    domain = env.domains.python_domain
    found: dict[str, str] = {}
    for name in sorted(domain.objects, key=lambda name: (name.count("."), name), reverse=True):
        parts = name.split(".")
        found[parts[-1]] = found[".".join(parts[-2:])] = name
    return found


def resolve(app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.Element) -> Any:
    """A name in a docstring or in a signature: a link to where it is documented, or plain text if it is not ours.

    What a docstring puts into backticks and is neither is a warning: it was renamed, or never was public.
    """
    if node.get("refdomain") != "py":
        return None
    target: str = node["reftarget"]
    names = _suffixes(env)
    *before, last = target.split(".")
    if not before or before[0] == "towline":
        candidates = [".".join([*before[-1:], last]), last]
    else:
        candidates = [target, *before[-1:]]  # an attribute that has no text of its own is linked to its class
    name = next((names[each] for each in candidates if each in names), None)
    if name is not None:
        entry = env.domains.python_domain.objects[name]
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, [content], name)
    is_ours = node["reftype"] == "obj" and len(last) > 1 and (before or [last])[0] not in FOREIGN
    return None if is_ours else content


def show_examples(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Indented blocks of a docstring are examples and pictures: show them as they are written."""
    shown: list[str] = []
    for number, line in enumerate(lines):
        before = next((each for each in reversed(lines[:number]) if each.strip()), "")
        begins = line.startswith("    ") and number > 0 and not lines[number - 1].strip()
        if begins and before[:1] not in ("", " ", "-", "*") and not before.endswith("::"):
            shown += ["::", ""]
        if _SECTION.fullmatch(line):
            shown += lines[number:]
            break
        shown.append(line)
    lines[:] = shown
    app.env.temp_data["towline text"] = shown


def keep_colons(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Of an attribute napoleon takes what stands before a colon for its type. Ours say no types, so undo it."""
    if what in ("attribute", "data", "property"):
        lines[:] = app.env.temp_data.pop("towline text", lines)


def find_text(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """The text below a constant is known in the module that defines it; the door that passes it on has to ask there."""
    package, _, last = name.rpartition(".")
    if what != "data":
        return
    for module in [each for each in sys.modules if each.startswith(f"{package}.")]:
        with suppress(PycodeError):
            texts = ModuleAnalyzer.for_module(module).find_attr_docs()
            if ("", last) in texts and getattr(sys.modules[module], last, None) is obj:
                lines[:] = texts["", last]
                return


def shorten(app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: Any) -> Any:
    """Defaults whose repr is no Python, or nothing in the whole signature would be a link."""
    if signature is None:
        return None
    signature = re.sub(r"<(?:function|class|built-in function) '?([\w.]+)'?(?: at \w+)?>", r"\1", signature)
    return re.sub(r"<[^<>]*>", "...", signature), returns


def write_llms(app: Sphinx, error: Exception | None) -> None:
    """``llms.txt``: what there is to read, as plain text: https://llmstxt.org."""
    if error is not None or app.builder.format != "html":
        return
    lines = [f"# {project}", "", "> Connections that outlive the network, and calls that survive their targets."]
    folder = None
    for name in sorted(app.env.found_docs, key=lambda name: (name.count("/"), name)):
        source = Path(app.env.doc2path(name))
        if source.suffix != ".md" or name == root_doc:
            continue
        if source.parent != folder:
            folder = source.parent
            lines += ["", f"## {'Documentation' if folder == HERE else folder.name.capitalize()}", ""]
        title = app.env.titles[name].astext()
        lines.append(f"- [{title}](_sources/{source.relative_to(HERE)}.txt): {_first_sentence(source.read_text())}")
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines) + "\n")


def _first_sentence(text: str) -> str:
    paragraphs: Sequence[str] = [each for each in re.split(r"\n\s*\n", text) if not each.startswith(("#", "<!--"))]
    sentence = re.split(r"(?<=\.) ", " ".join(paragraphs[0].split()), maxsplit=1)[0]
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", sentence)


def setup(app: Sphinx) -> None:
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", find_text, priority=300)
    app.connect("autodoc-process-docstring", show_examples, priority=400)
    app.connect("autodoc-process-docstring", keep_colons, priority=600)  # napoleon is between these two
    app.connect("autodoc-process-signature", shorten)
    app.connect("build-finished", write_llms)
