"""The lesson's notebook runs, says what it said when it was recorded, and judges well.

`python tests/test_notebook.py` executes it and records its outputs anew.
"""

import os
import pathlib
import re
import sys
import tempfile

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

NOTEBOOK = pathlib.Path(__file__).parents[1] / "examples" / "lesson.ipynb"

# For each exercise's variable: right answers, and wrong ones.
ANSWERS = {
    "my_gradient": (
        ["lambda w: 4 * (w - 1) ** 3", "jax.grad(lambda w: (w - 1) ** 4)"],
        ["lambda w: 4 * (w - 1)", "32.0"],
    ),
    "my_slopes": (
        ["[-8, -8, -12, -4]", "jnp.array([-8.0, -8.0, -12.0, -4.0])"],
        ["[-10, -10, -15, -5]", "-8"],
    ),
    "my_update": (
        ["lambda p, g, r: jax.tree.map(lambda p, g: p - r * g, p, g)"],
        [
            "lambda p, g, r: jax.tree.map(lambda p, g: p + r * g, p, g)",
            "lambda p, g, r: None",
        ],
    ),
    "my_rate": (["1 / 30", "0.0333"], ["2 / 30", "'1/30'"]),
}


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A new working directory, and a home for what Jupyter and IPython write."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    work = tmp_path / "work"
    work.mkdir()
    return work


def load():
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook, directory, **options):
    """Runs all cells in place, in a kernel of the running interpreter."""
    # With no directories to look in, the kernel is ipykernel's own.
    manager = AsyncKernelManager(
        kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[])
    )
    client = NotebookClient(
        notebook,
        km=manager,
        timeout=300,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(directory)}},
        **options,
    )
    client.execute(cleanup_kc=True)
    return notebook


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def streams(cell, name):
    return "".join(
        output.text for output in cell.get("outputs", []) if output.get("name") == name
    )


def shown(cell):
    """What a cell printed, and what it displayed as plain text."""
    displayed = [o.data["text/plain"] for o in cell.get("outputs", []) if "data" in o]
    return streams(cell, "stdout"), displayed


def test_runs_and_gives_the_recorded_outputs(fresh):
    recorded, notebook = load(), load()
    probe = """import os, sys
for fact in (sys.executable, os.getcwd(), "torch" in sys.modules):
    print(fact)"""
    notebook.cells.append(nbformat.v4.new_code_cell(probe))
    *cells, last = execute(notebook, fresh).cells
    facts = [sys.executable, str(fresh.resolve()), "False"]
    assert streams(last, "stdout").splitlines() == facts
    for cell, before in zip(cells, recorded.cells, strict=True):
        assert shown(cell) == shown(before), cell.id
        assert "Warning" not in streams(cell, "stderr"), cell.id


def test_judges_answers_kindly_and_a_wrong_one_spoils_nothing_else(fresh):
    notebook = load()
    names = {
        cell.id: name
        for cell, name in zip(tagged(notebook, "solution"), ANSWERS, strict=True)
    }
    cells, trials = [], []
    for cell in notebook.cells:
        cells.append(cell)
        right, wrong = ANSWERS.get(names.get(cell.id), ([], []))
        for answer in right + wrong:
            trial = nbformat.v4.new_code_cell(
                f"{names[cell.id]} = {answer}\n{cell.source}"
            )
            cells.append(trial)
            trials.append((answer in right, trial))
    notebook.cells = cells
    execute(notebook, fresh, allow_errors=True)

    errors = {
        cell.id: output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    }
    assert list(errors) == [cell.id for is_right, cell in trials if not is_right]
    for error in errors.values():
        assert error.ename == "AssertionError"
        assert error.evalue.startswith("Not yet, and that is fine. ")
    for is_right, cell in trials:
        assert streams(cell, "stdout") == ("Right.\n" if is_right else "")


def test_has_four_exercises_each_with_a_hidden_solution():
    cells = load().cells
    kinds = [(cell.cell_type, *cell.metadata.get("tags", [])) for cell in cells]
    starts = [i for i, kind in enumerate(kinds) if kind == ("markdown", "exercise")]
    assert len(starts) == len(ANSWERS) == 4
    for i, name in zip(starts, ANSWERS, strict=True):
        assert kinds[i + 1 : i + 3] == [("code", "answer"), ("code", "solution")]
        assert cells[i + 1].source.startswith(f"{name} = None  # your turn: ")
        assert cells[i + 2].metadata["jupyter"] == {"source_hidden": True}


def test_is_recorded_clean():
    notebook = load()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {o.get("name") for cell in code for o in cell.outputs} <= {"stdout", None}
    assert not any("execution" in cell.metadata for cell in code)
    assert notebook.metadata == {
        "kernelspec": {
            "display_name": "Python 3 (ipykernel)",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }


def test_each_number_in_the_prose_is_shown_by_a_cell():
    notebook = load()
    hidden = tagged(notebook, "solution")
    visible = [cell for cell in notebook.cells if cell not in hidden]
    code = [cell for cell in visible if cell.cell_type == "code"]
    in_cells = numbers(" ".join(cell.source + str(shown(cell)) for cell in code))
    for cell in visible:
        if cell.cell_type == "markdown":
            prose = re.sub(r"^#.*$|^> \d\.", "", cell.source, flags=re.MULTILINE)
            assert numbers(prose) <= in_cells, cell.id


def numbers(text):
    return {float(n) for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?", text)}


def record():
    with tempfile.TemporaryDirectory() as directory:
        notebook = execute(load(), directory)
    notebook.metadata.language_info = {"name": "python"}
    whole = NOTEBOOK.with_suffix(".ipynb.new")
    nbformat.write(notebook, whole)
    os.replace(whole, NOTEBOOK)


if __name__ == "__main__":
    record()
