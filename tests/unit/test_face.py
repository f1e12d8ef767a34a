"""What `import shardbus` and `import loadgen` offer: the same to programs as to type checkers, and only when it is used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", ["shardbus", "loadgen"])
def test_a_type_checker_sees_the_names_that_a_program_gets(package: str):
    face = importlib.import_module(package)
    stub = ast.parse((ROOT / package / "__init__.pyi").read_text(encoding="utf-8"))
    seen = {alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(seen) == sorted(face.__all__)
    for name, module in seen.items():
        assert getattr(face, name) is getattr(importlib.import_module(module), name)
    assert set(face.__all__) <= set(dir(face))


@pytest.mark.parametrize("package", ["shardbus", "loadgen"])
def test_a_name_that_is_not_there_is_an_attribute_error(package: str):
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        importlib.import_module(package).nothing  # noqa: B018


def test_the_entry_of_a_command_imports_next_to_nothing():
    program = "import sys; had = {*sys.modules}; import loadgen.__main__, shardbus.__main__; print(*{*sys.modules} - had)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"asyncio", "click", "typing", "msgspec", "contextlib"} & set(done.stdout.split())
