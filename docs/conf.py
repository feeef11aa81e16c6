"""Settings of the site (`make site`), which Sphinx makes from the notebooks as they are and from the pages of docs/.

The root of the repository is the source, so that a link is the same on the site, in JupyterLab and on a git server.
Nothing is executed, and no page asks another machine for anything: formulas are MathML, which browsers draw themselves.
"""

import json
import re
from contextlib import suppress
from pathlib import Path
from shutil import copy
from textwrap import shorten

from docutils import nodes
from latex2mathml.converter import convert
from PIL import Image

project = html_title = "Finding NeMo, step by step"
extensions = ["myst_nb"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "docs/*.md",
    "notebooks/*.ipynb",
    "notebooks/beyond/*.ipynb",
    "figures/*/index.md",
    "data/README.md",
    "data/tiny/README.md",
]
exclude_patterns = [".*", "build", "data/sd14", "nemolib", "tests", "tools", "benchmarks", "examples"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "▸ Show the code", "▾ Hide the code"
nb_ipywidgets_js = {}
# Without a kernel nothing moves a widget: the still frame beside it is shown.
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = html_css_files = ["site.css"]
html_copy_source = html_use_index = html_show_copyright = False

PIXELS_PER_INCH = 128
"""Of a figure in print: a third more than browsers give an inch, since its letters are small."""

FOLDED = {"setup", "definition", "saving", "checking"}
"""Tags of cells whose code need not be read."""


def github_anchor(anchor):
    """Return a heading's anchor without the capitals and the punctuation that JupyterLab leaves in it."""
    return re.sub(r"[^\w-]", "", anchor).lower()


def fold(app, docname, source):
    """Fold the cells of a notebook that need not be read; write anchors as they are on the site."""
    if docname.startswith("figures/"):
        source[0] = source[0].replace("<", "&lt;")  # signs of captions
    if not docname.startswith("notebooks/"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        tags, text = cell["metadata"].setdefault("tags", []), "".join(cell["source"])
        if cell["cell_type"] == "code":
            tags += ["hide-cell"] * ("solution" in tags)
            tags += ["hide-input"] * (not {"hide-cell", "hide-input"} & {*tags} and bool(FOLDED & {*tags}))
            continue
        cell["source"] = [re.sub(r"\]\(#([^)]+)\)", lambda link: f"](#{github_anchor(link[1])})", text)]
    source[0] = json.dumps(notebook)


def pictures(app, doctree):
    """Show pictures by the dots per inch that their files state, and say in words what those of notebooks show."""
    title, unnamed = "", []
    for node in [*doctree.findall(lambda node: isinstance(node, nodes.image | nodes.strong | nodes.title)), None]:
        if isinstance(node, nodes.image):
            unnamed += [node] * ("alt" not in node)
            with suppress(OSError), Image.open(Path(app.srcdir, node["uri"])) as picture:
                node["width"] = f"{picture.width * PIXELS_PER_INCH / picture.info.get('dpi', (96,))[0]:.0f}px"
            continue
        # The caption comes below; a picture without one is named after its section.
        for picture in unnamed:
            picture["alt"] = shorten(node.parent.astext() if isinstance(node, nodes.strong) else title, 160)
        unnamed.clear()
        title = node.astext() if isinstance(node, nodes.title) else title


def gallery(app, doctree):
    """Put small pictures that lead to the large ones on top of a page of figures."""
    if not app.env.docname.startswith("figures/"):
        return
    small = nodes.paragraph(classes=["gallery"])
    for node in list(doctree.findall(nodes.image)):
        picture = node.deepcopy()
        picture.attributes.pop("width", None)
        (place,) = node.parent.parent["ids"][:1]
        small += nodes.reference("", "", picture, refid=place, reftitle=node["alt"])
    doctree.next_node(nodes.title).parent.insert(1, small)


def math(self, node):
    """Write a formula as MathML."""
    display = "inline" if isinstance(node, nodes.math) else "block"
    self.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def whole_pages(app, exception):
    """Let the site's own folder open on its first page, and copy the pages that stand for themselves."""
    if exception:
        return
    for page in Path(app.srcdir).glob("figures/*/explore.html"):
        place = Path(app.outdir, page.relative_to(app.srcdir))
        place.parent.mkdir(parents=True, exist_ok=True)
        copy(page, place)
    Path(app.outdir, "index.html").write_text('<meta http-equiv="refresh" content="0; url=docs/index.html">\n')


def setup(app):
    """Connect all this with Sphinx."""
    app.add_html_math_renderer("mathml", inline_renderers=(math, None), block_renderers=(math, None))
    app.connect("source-read", fold)
    app.connect("doctree-read", pictures)
    app.connect("doctree-read", gallery)
    app.connect("build-finished", whole_pages)
