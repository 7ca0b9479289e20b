"""Settings of the documentation site: `make docs` builds it into build/docs, warnings are errors, and no network is asked.

The build executes the notebooks in `docs/notebooks`.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

from hetlora import __version__

if TYPE_CHECKING:
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project, author, release = "hetlora", "The hetlora authors", __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

html_theme = "furo"  # its fonts are the system's, and its scripts come with the pages
html_title = f"hetlora {release}"
html_show_sphinx = False
PLOTLY = Path(plotly.__file__).parent / "package_data/plotly.min.js"
html_static_path, html_css_files, html_favicon = ["static", str(PLOTLY)], ["site.css"], "static/icon.svg"
html_copy_source = False
html_search_scorer = str(Path(__file__).with_name("search_scorer.js"))

html_math_renderer = "mathml"  # browsers draw it themselves; the other renderers load a script from the network

nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_show_tb = True  # a cell that raises is a warning, hence an error
nb_execution_timeout = 600  # seconds per cell
nb_merge_streams = True
nb_render_markdown_format = "myst"  # else a table that a cell shows is none
nb_output_stderr = "remove"  # progress bars

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # the anchors that GitHub gives headings, which the pages' links name

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "exclude-members": "__new__, __init__"}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_use_ivar = True  # attributes of a record stand in its docstring, each once
napoleon_custom_sections = ["Reference"]
default_role = "py:obj"  # `name` in a docstring links to what has a page here, see `as_code`

nitpick_ignore_regex = [
    # Of other projects, whose pages are not asked for: the build needs no network. The second are imported for checkers alone.
    ("py:.*", r"(argparse|collections|dataclasses|numpy|os|pathlib|plotly|torch|transformers|typing)\..*"),
    ("py:class", r"Figure|Path|PreTrained\w+|Tensor"),
    ("py:class", r"Literal\['\w+'|Mapping\[str"),  # cut at their commas
    # Other names of types, and variables of them: there is nothing to say of these.
    ("py:class", r"(.*\.)?(Changes|Fields|Key|SourceOfRun|T|Total)"),
    # The package's own, which nobody calls.
    (
        "py:class",
        (
            r"hetlora\.(runs\.(display|trained_run)|flower\.(transport|membership)|model\.packing)\..*"
            r"|hetlora\.core\.((population|exact_sum)\..*|aggregation\.(Owners|FactorSum))|.*\._\w+|DataConfig"
        ),
    ),
    ("py:class", r"list\[tuple\[float"),  # of an annotation that Sphinx cuts at its comma
]

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
OF_THE_ROOT = {"security": "SECURITY.md", "contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}
"""Pages whose text is a file of the repository's root, where people look for it."""

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def read_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Take the text of a page from the root where it is there, and turn links between the two to the site's own pages.

    Any other file of the repository that a page links to is copied into the site.
    """
    file = DOCS / f"{page}.md"
    if page in OF_THE_ROOT:
        file = ROOT / OF_THE_ROOT[page]
        app.env.note_dependency(str(file))
        source[0] = file.read_text("utf8")

    def in_the_site(link: re.Match[str]) -> str:
        if link.string[link.string.rfind("[", 0, link.start()) - 1] == "!":
            return link[1]  # a picture is copied from wherever it is
        target = Path(os.path.normpath(file.parent / link[1]))
        pages = {ROOT / name: DOCS / f"{own}.md" for own, name in OF_THE_ROOT.items()}
        target = pages.get(target, target)
        return ("" if target.is_relative_to(DOCS) else "path:") + os.path.relpath(target, (DOCS / page).parent)

    if app.env.doc2path(page).suffix == ".ipynb":
        source[0] = in_the_text(source[0], lambda text: LINK.sub(in_the_site, text))
    else:
        source[0] = LINK.sub(in_the_site, source[0])


def in_the_text(notebook: str, change: Callable[[str], str]) -> str:
    """Change the text of a notebook, and not its code."""
    content = json.loads(notebook)
    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = change("".join(cell["source"]))
    return json.dumps(content)


EXTERNAL_SCRIPT = re.compile(r"<script[^>]*\ssrc=[\"']https?://[^>]*></script>")


def without_network(app: Sphinx, doctree: nodes.document) -> None:
    """Let the figures of a notebook load plotly from the site, once per page, and nothing from the network."""
    place = os.path.relpath("_static", Path(app.env.docname).parent)
    scripts = [f'<script src="{place}/{PLOTLY.name}"></script>']
    for output in list(doctree.findall(nodes.raw)):
        if EXTERNAL_SCRIPT.search(text := output.astext()):
            text = "".join(scripts) + EXTERNAL_SCRIPT.sub("", text)
            output.replace_self(nodes.raw("", text, format="html"))
            scripts.clear()


def as_mathml(translator: Any, node: nodes.Element) -> None:
    """Write a formula as MathML."""
    block = isinstance(node, nodes.math_block)
    translator.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def prepare_kernels(app: Sphinx) -> None:
    """Let the kernels of the notebooks read no configuration of the person's own, and write figures as HTML."""
    folder = Path(app.doctreedir) / "ipython"
    (folder / "profile_default").mkdir(parents=True, exist_ok=True)
    settings = "get_config().IPKernelApp.log_level = 'ERROR'  # else it warns that its ports are not encrypted\n"
    (folder / "profile_default/ipython_kernel_config.py").write_text(settings, encoding="utf8")
    logging.getLogger("traitlets").setLevel(logging.WARNING)  # else it says that it executes
    os.environ |= {"IPYTHONDIR": str(folder), "PLOTLY_RENDERER": "sphinx_gallery"}


def as_code(_: Sphinx, __: BuildEnvironment, node: pending_xref, shown: nodes.Node) -> nodes.Node | None:
    """Show `text` of a docstring as code where it is a formula or the name of something without a page."""
    return shown if node.get("reftype") == "obj" and not node.get("refexplicit") else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the functions above."""
    app.connect("source-read", read_page)
    app.connect("missing-reference", as_code)
    app.connect("builder-inited", prepare_kernels)
    app.connect("doctree-read", without_network)
    app.add_html_math_renderer("mathml", (as_mathml, None), (as_mathml, None))
    return {"parallel_read_safe": True}
