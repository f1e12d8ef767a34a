"""Which example a name gets, and what is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardbus import UsageError
from shardbus.example_application import EXAMPLES, example_of, write_example

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize(
    ("name", "example"), [("shop", "orders"), ("my-app", "orders"), ("chat", "chat"), ("orders", "orders")]
)
def test_a_name_that_is_an_example_s_gets_that_one(name: str, example: str) -> None:
    assert example_of(name) == example


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("name", ["shop", "my-app", "class", "7-eleven", "_x"])
def test_an_example_is_written_into_a_directory_of_the_name(tmp_path: Path, example: str, name: str) -> None:
    directory = write_example(example, name, tmp_path)
    assert directory == tmp_path / name
    assert {file.name for file in directory.iterdir()} == set(EXAMPLES[example].files)
    for file in directory.glob("*.py"):
        compile(file.read_text(), file.name, "exec")
    assert not [file for file in directory.iterdir() if "{name}" in file.read_text()]
    if example == "orders":
        assert f'Bus("{name}")' in (directory / "app.py").read_text()


@pytest.mark.parametrize("name", ["", ".", "..", "../shop", "a/b", "my shop", "-x", "caf\u00e9", "shop\n", "x" * 101])
def test_a_name_that_is_none_is_refused_with_one_that_is(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"cannot be the name of an application.*for instance my-shop"):
        write_example("orders", name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "shop").write_text("mine")
    with pytest.raises(UsageError, match="is there already, and nothing is overwritten; name another"):
        write_example("orders", "shop", tmp_path)
    assert (tmp_path / "shop").read_text() == "mine"


def test_the_chat_is_under_80_lines_and_stands_in_the_readme_as_it_is_written(tmp_path: Path) -> None:
    chat = (write_example("chat", "chat", tmp_path) / "chat.py").read_text()
    assert len(chat.splitlines()) < 80
    assert f"```python\n{chat}```" in README.read_text()
