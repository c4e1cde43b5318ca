"""The page of a look at the scale: losses on the task and on what is kept, from the base to beyond the tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafit.adapters import scaled_names
from lorafit.page import inside, render

PAGE = Path(__file__).parent / "scale.html.jinja"


def page(found: dict[str, Any], picture: str) -> str:
    """One HTML page that needs nothing else. found: the content of scale.json. picture: of it, as SVG."""
    names = scaled_names(found)
    rows = [
        (
            f"{point['scale']:g}",
            *(f"{point[name]:.4f}" for name in names),
            "the best" * (point["scale"] == found["best"]),
        )
        for point in found["points"]
    ]
    return render(PAGE, found=found, picture=inside(picture), columns=("scale", *names, ""), rows=rows)
