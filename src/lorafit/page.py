"""Pages that need nothing else: one file of HTML, in light and dark, for a wide screen and a narrow one.

`page.html.jinja` is what all of them extend: head, colours, style. `tables.html.jinja` has the macros they share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafit.units import format_bytes, format_count

HERE = Path(__file__).parent
# As a template names it in `extends` and `from`.
SHARED = {"page": HERE / "page.html.jinja", "tables": HERE / "tables.html.jinja"}


def render(template: Path, **values: Any) -> str:
    """A page from a template that extends `page`. Filters beside jinja's own: bytes, count.

    A name that the template uses and nobody gave is an error. Texts are escaped.
    """
    import jinja2

    sources = {name: path.read_text(encoding="utf-8") for name, path in (SHARED | {"own": template}).items()}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(sources), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"bytes": format_bytes, "count": format_count}
    return environment.get_template("own").render(**values)


def inside(picture: str) -> str:
    """An SVG as it stands inside a page."""
    return picture.replace(' xmlns="http://www.w3.org/2000/svg"', "")
