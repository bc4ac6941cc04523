"""Digests of code are the same on every Python: committed records and null blocks bear those of 3.11."""

from hashlib import sha256
from pathlib import Path

import pytest

from bench.syntax import dump, parse

SOURCE = '''
"""A docstring."""
import ast
from os import path as place, sep

@decorated(1)
class Bare(Base, key=None):
    """Another."""

    width: int = 3
    names: list[str]

class Empty: ...

def plain(): """Said."""

async def full(a, /, b=2, *rest, c, d="x", **more) -> "Text":
    """A third."""
    async with a as b, c:
        yield [], {}, (), {**a, 1: None}, "", b"", 1.5, ...
    global sep
    return lambda: f"{b}", f"{b!r:>{c}}", f"{a=:{b}{c}}", f"", "one" f"{b}" ""

match full:
    case {"a": [1, *_], **rest} if rest: pass
    case Bare(width=None) | -1j: raise SystemExit from None
for _ in (): pass
else: text = ", type_params=[]"
try: del text[::2]
except* ValueError as error: print(*[x async for x in y if z if w])
'''


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.py"
    path.write_text(SOURCE)
    return path


def test_code_has_the_text_of_python_3_11_on_every_python(source: Path) -> None:
    text = dump(parse(source))
    assert sha256(text.encode()).hexdigest()[:12] == "a4629eb7bc37"
    assert "FunctionDef(name='plain', args=arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[]" in text


def test_a_text_that_reads_like_a_field_is_kept(source: Path) -> None:
    text = dump(parse(source))
    assert text.count("type_params") == 1
    assert "Constant(value=', type_params=[]')" in text
    source.write_text(SOURCE.replace(", type_params=[]", ""))
    assert dump(parse(source)) != text


def test_comments_layout_and_docstrings_do_not_count_and_code_does(source: Path) -> None:
    text = dump(parse(source))
    source.write_text(SOURCE.replace("A third.", "Anything.").replace("class Empty", "# why\nclass  Empty"))
    assert dump(parse(source)) == text
    source.write_text(SOURCE.replace("width: int = 3", "width: int = 4"))
    assert dump(parse(source)) != text
