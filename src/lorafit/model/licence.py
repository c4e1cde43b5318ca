"""The licence of a model, where its files state one. No torch, no transformers."""

from __future__ import annotations

import re

from lorafit.model import gguf_header
from lorafit.model.spec import ModelSpec

FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
FIELD = re.compile(r"^license(_name)?:[ \t]*[\"']?([^\"'\n#]+)", re.MULTILINE)


def licence_of(spec: ModelSpec) -> str | None:
    """Its name as Hugging Face knows it (`apache-2.0`), from the GGUF header or the README's front matter."""
    if spec.kind == "gguf":
        stated = gguf_header.read_header(spec.path).metadata.get("general.license")
        return str(stated) if stated else None
    readme = spec.path / "README.md"
    if not readme.is_file():
        return None
    matter = FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace"))
    found: dict[str, str] = {name: value.strip() for name, value in FIELD.findall(matter[1])} if matter else {}
    if found.get("") == "other":  # its own name is more telling
        return found.get("_name", "other")
    return found.get("") or None
