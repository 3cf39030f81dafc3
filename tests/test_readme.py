"""The README tells the truth: its code runs, and prints what stands under it."""

import contextlib
import io
import itertools
import linecache
import pathlib
import re

import pytest

import jaxgrad

README = pathlib.Path(__file__).parents[1] / "README.md"
TEXT = README.read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)


def steady(text):
    """What is printed, but for seconds and for numbers of the size of rounding."""
    text = re.sub(r"\b\d+\.\d\d s\b", "some s", text)
    text = re.sub(r"\b\d(\.\d+)?e-(0[89]|[1-9]\d)\b", "tiny", text)
    return re.sub("─+", "─", re.sub(" +", " ", text))


def run(code, scope):
    """As a file of its own, so that the lines that are named are those of the block."""
    name = "example.py"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    exec(compile(code, name, "exec"), scope)


def test_every_python_block_prints_what_stands_under_it():
    scope, ran = {}, 0
    for (language, code), (following, expected) in itertools.pairwise(BLOCKS):
        if language != "python":
            continue
        assert following in ("text", "mermaid"), f"no output stands under:\n{code}"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            run(code, scope)
        assert steady(printed.getvalue()) == steady(expected)
        ran += 1
    assert ran == sum(language == "python" for language, _ in BLOCKS) > 5


def test_the_lessons_part_is_what_the_lesson_prints(capsys):
    from jaxgrad.cli import main

    main(["lesson", "--no-torch"])
    screen = [line for line in capsys.readouterr().out.splitlines() if line]
    (shown,) = (text for _, text in BLOCKS if text.startswith("6. Why"))
    lines = [line for line in shown.splitlines() if line]
    start = screen.index(lines[0])
    assert screen[start : start + len(lines)] == lines


@pytest.mark.parametrize("name", jaxgrad.__all__)
def test_every_public_name_is_in_the_readme(name):
    assert re.search(rf"\b{name}\b", TEXT)


def test_every_linked_file_is_there():
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert link.startswith("https://") or (README.parent / link).exists(), link
