"""The file as a notebook: pasted into one cell, or cell by cell."""

import os
import re
import shutil

import pytest
from conftest import SCRIPT, load

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
SOURCE = SCRIPT.read_text(encoding="utf-8")
CELLS = jupytext.reads(SOURCE, fmt="py:percent").cells


@pytest.fixture
def notebook(tmp_path, data, monkeypatch):
    """notebook(code) runs a cell in Jupyter; returns its text, number of pictures, errors."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    shutil.copytree(data, "mnist")
    nb = nbformat.v4.new_notebook()
    client = nbclient.NotebookClient(nb, kernel_name="python3", timeout=100, allow_errors=True)

    def execute(code):
        nb.cells.append(nbformat.v4.new_code_cell(code))
        outputs = client.execute_cell(nb.cells[-1], len(nb.cells) - 1).outputs
        text = "".join(output.get("text", str(output.get("data", ""))) for output in outputs)
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        return text, pictures, [output.ename for output in outputs if "ename" in output]

    with client.setup_kernel():
        yield execute


def test_text_and_code_alternate_and_formulas_do_not_become_list_items():
    assert [cell.cell_type for cell in CELLS] == ["markdown", "code"] * (len(CELLS) // 2)
    assert len(CELLS) > 10
    lines = "\n".join(cell.source for cell in CELLS[::2]).splitlines()
    assert all(line.startswith("- *") for line in lines if re.match("[-+*] ", line))


def test_cell_by_cell_only_the_last_starts_the_job_which_can_be_interrupted_and_resumed(notebook):
    *definitions, last = [cell.source for cell in CELLS if cell.cell_type == "code"]
    assert [notebook(source) for source in definitions] == [("", 0, [])] * len(definitions)
    assert os.listdir() == ["mnist"]
    [lines] = re.findall(r"# ```python\n((?:# .*\n)*)# ```", SOURCE)
    assert notebook(re.sub("^# ", "", lines, flags=re.MULTILINE))[1:] == (1, [])
    notebook("train_cvae.__defaults__ = 2, *train_cvae.__defaults__[1:]  # two epochs")
    text, *rest = notebook(last)  # pictures: the samples, the losses, the 6s, 0 to 9, the styles
    assert "epoch 2/2" in text and rest == [5, []]
    stop = "import _thread, threading\nthreading.Timer(2, _thread.interrupt_main).start()"
    assert notebook(f"{stop}\nmodel = train_cvae(epochs=100_000)")[2] == ["KeyboardInterrupt"]
    epochs = load()["epoch"] + 1
    text, _, errors = notebook(f"model = train_cvae(epochs={epochs}, resume=True)")
    assert text.count("\nepoch ") == 1 and not errors and load()["epoch"] == epochs


def test_pasted_into_one_cell_it_does_the_whole_job(notebook):
    first = "train_cvae.__defaults__ = 1, *train_cvae.__defaults__[1:]  # one epoch"
    cells = SOURCE.split("if __name__")
    text, *rest = notebook(f"{cells[0]}{first}\nif __name__{cells[1]}")
    assert "epoch 1/1" in text and rest == [5, []]
