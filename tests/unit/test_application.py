"""`MODULE:BUS` and `MODULE:CLASS`: what is wrong with one is told in a line, with the place where that is the module's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardbus.application import load_application, load_message_type
from shardbus.errors import BootError

MODULES = {
    "sound": (
        "from shardbus import Bus, Event\nclass Placed(Event):\n    n: int = 0\nclass Shop:\n    bus = Bus('shop')\n"
        "bus = Bus('sound')\nother = Bus('other')\nnumber = 3\n"
    ),
    "empty": "",
    "divides": "x = 1\n1 / 0\n",
    "unwritten": "x = 1\ndef (:\n",
    "indented": "x = 1\n  y = 2\n",
    "numbered": "raise SyntaxError(5)\n",
    "bare": "raise SyntaxError\n",
    "halved": "raise SyntaxError('half \\ud800')\n",
    "exits": "import sys\nsys.exit(3)\n",
    "mute": "class Mute(Exception):\n    def __getattribute__(self, name):\n        raise KeyError(name)\n"
    "    def __str__(self):\n        raise SystemExit(3)\nraise Mute\n",
    "wordy": "raise ValueError('two\\nlines')\n",
    "proxies": "class Proxy:\n    __class__ = property(lambda self: 1 / 0)\nrequest = Proxy()\n",
    "lazy": "def __getattr__(name):\n    import no_such_module_anywhere\n",
    "half": "raise ValueError('half \\ud800')\n",
    "misnames": "raise ModuleNotFoundError('by number', name=5)\n",
    "leaves": "import sys\ndef __getattr__(name):\n    sys.exit(3)\n",
    "lacks": "import no_such_module_anywhere\n",
    "misregisters": "from shardbus import Bus\nbus = Bus('')\n",
}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """These modules, in the present directory; forgotten afterwards."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


BUSES = [
    ("sound", "'sound' is not MODULE:BUS, for instance shop:bus"),
    ("sound:", "'sound:' is not MODULE:BUS"),
    (":bus", "':bus' is not MODULE:BUS"),
    ("nowhere:bus", "there is no module 'nowhere' here ({here}) or on the Python path"),
    ("no.py:bus", "there is no module 'no.py' here ({here}) or on the Python path; a module is named without that: no:bus"),
    ("nowhere.deeper:bus", "there is no module 'nowhere.deeper' here"),
    ("sound:nothing", "sound has no Bus named 'nothing'; it has bus, other"),
    ("sound:number", "sound has no Bus named 'number'; it has bus, other"),
    ("empty:bus", "empty has no Bus named 'bus'"),
    ("divides:bus", "divides does not import: ZeroDivisionError: division by zero ({here}/divides.py:2)"),
    ("unwritten:bus", "unwritten does not import: SyntaxError: invalid syntax ({here}/unwritten.py:2)"),
    ("indented:bus", "indented does not import: IndentationError: unexpected indent ({here}/indented.py:2)"),
    ("numbered:bus", "numbered does not import: SyntaxError: 5 ({here}/numbered.py:1)"),
    ("bare:bus", "bare does not import: SyntaxError: None ({here}/bare.py:1)"),
    ("halved:bus", r"halved does not import: SyntaxError: half \ud800 ({here}/halved.py:1)"),
    ("exits:bus", "exits does not import: SystemExit: 3 ({here}/exits.py:2)"),
    ("mute:bus", "mute does not import: Mute: <its text cannot be shown: SystemExit> ({here}/mute.py:6)"),
    ("wordy:bus", r"wordy does not import: ValueError: two\nlines ({here}/wordy.py:1)"),
    ("proxies:bus", "proxies has no Bus named 'bus'"),
    ("lazy:bus", "lazy has no 'bus': No module named 'no_such_module_anywhere'"),
    ("half:bus", r"half does not import: ValueError: half \ud800 ({here}/half.py:1)"),
    ("misnames:bus", "misnames does not import: by number ({here}/misnames.py:1)"),
    ("leaves:bus", "leaves has no 'bus': SystemExit: 3 ({here}/leaves.py:3)"),
    ("lacks:bus", "lacks does not import: No module named 'no_such_module_anywhere' ({here}/lacks.py:1)"),
    ("misregisters:bus", "misregisters does not import: a bus needs a name, for instance Bus('shop') ({here}/misreg"),
]


@pytest.mark.parametrize(("name", "told"), BUSES)
def test_what_is_no_application_is_told_in_a_line(modules: Path, name: str, told: str):
    with pytest.raises(BootError) as raised:
        load_application(name)
    assert str(raised.value).startswith(told.format(here=modules))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Placed", "'Placed' is not MODULE:CLASS, for instance shop:OrderPlaced"),
        ("sound:Nothing", "sound has no event or command 'Nothing'; it has Placed"),
        ("sound:bus", "sound has no event or command 'bus'; it has Placed"),
        ("empty:Event", "empty has no event or command 'Event'"),
        ("proxies:Placed", "proxies has no event or command 'Placed'"),
        ("divides:Placed", "divides does not import: ZeroDivisionError"),
    ],
)
def test_what_is_no_message_type_is_told_in_a_line(name: str, told: str):
    with pytest.raises(BootError) as raised:
        load_message_type(name)
    assert str(raised.value).startswith(told)


def test_a_bus_inside_of_something_is_found():
    assert load_application("sound:Shop.bus").name == "shop"
