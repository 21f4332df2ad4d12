"""How it is started: by Python in every way, in IPython, as cells of a notebook."""

import builtins
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from unittest.mock import Mock

import pytest
import torch
from conftest import SCRIPT, SOURCE, load
from PIL import Image

TEN_LINES = re.sub("^# ", "", re.findall(r"# ```python\n((?:# .*\n)*)# ```", SOURCE)[0], flags=re.M)


def paste(**names):
    exec(compile(SOURCE, "a cell", "exec"), {"__name__": "__main__", **names})


@pytest.mark.parametrize("start", ["-", "-m", "zipapp"])
def test_however_python_is_told_to_run_it_options_are_options(monkeypatch, start):
    monkeypatch.setattr(sys, "argv", [start, "draw"])
    monkeypatch.setattr(sys, "stdout", None)
    with zipfile.ZipFile("app.pyz", "w") as app:
        app.write(SCRIPT, "__main__.py")
    with pytest.raises(SystemExit, match="Checkpoint not found"):  # `draw` ends at once
        if start == "-m":
            runpy.run_module("cvae_mnist", run_name="__main__", alter_sys=True)
        runpy.run_path("app.pyz", run_name="__main__") if start == "zipapp" else paste()


def test_in_ipython_options_are_a_kernels_unless_it_runs_this_file(monkeypatch):
    file = {"__file__": str(SCRIPT)}  # VS Code and Spyder set it in a cell, too
    kernels = [({}, ["lib/ipykernel_launcher.py"]), ({}, ["xpython"]), (file, [""])]
    kernels += [(file, ["positron_kernel.py"]), (file, [str(SCRIPT), "--f=/x/kernel.json"])]
    monkeypatch.setattr(torch, "manual_seed", Mock(side_effect=NotImplementedError))  # to train
    for names, program in kernels:
        monkeypatch.setattr(sys, "argv", [*program, "draw"])
        pytest.raises(SystemExit, paste, **names)  # without IPython, options are options
        monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
        pytest.raises(NotImplementedError, paste, **names)
        monkeypatch.delattr(builtins, "__IPYTHON__")
    monkeypatch.setattr(sys, "argv", ["lib/pydevconsole.py", "draw"])  # PyCharm, without IPython
    pytest.raises(NotImplementedError, paste)


def test_the_ten_lines_are_a_script_that_draws_black_on_white(data):
    shutil.copytree(data, "mnist")
    exec(f"from cvae_mnist import *\n{TEN_LINES}", {})
    picture = Image.open("idea.png")
    assert picture.width > 9 * picture.height and picture.resize((1, 1)).getpixel((0, 0)) > 150


def test_a_terminals_ipython_runs_it_with_options_and_shows_no_picture(trained, monkeypatch):
    pytest.importorskip("IPython")
    monkeypatch.setenv("IPYTHONDIR", ".")
    shutil.copy(SCRIPT, "cvae_mnist.py")
    command = [sys.executable, "-m", "IPython", "cvae_mnist.py", "--", "draw", "--digit=3"]
    output = subprocess.check_output([*command, f"--out-dir={trained}"], text=True, timeout=100)
    assert "CVAE_3.png" in output and "CVAE_0" not in output and "Image object" not in output


@pytest.fixture
def notebook(tmp_path, data, monkeypatch):
    """notebook(code) runs a cell in Jupyter; returns its text, number of pictures, errors."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    shutil.copytree(data, "mnist")
    book = nbformat.v4.new_notebook()
    client = nbclient.NotebookClient(book, kernel_name="python3", timeout=100, allow_errors=True)

    def execute(code):
        book.cells.append(nbformat.v4.new_code_cell(code))
        outputs = client.execute_cell(book.cells[-1], len(book.cells) - 1).outputs
        text = "".join(output.get("text", str(output.get("data", ""))) for output in outputs)
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        return text, pictures, [output.ename for output in outputs if "ename" in output]

    with client.setup_kernel():
        yield execute


def test_cell_by_cell_in_one_cell_with_run_interrupted_and_resumed(notebook, options):
    cells = pytest.importorskip("jupytext").reads(SOURCE, fmt="py:percent").cells
    assert [cell.cell_type for cell in cells] == ["markdown", "code"] * (len(cells) // 2)
    *definitions, last = [cell.source for cell in cells[1::2]]
    assert [notebook(source) for source in definitions] == [("", 0, [])] * len(definitions)
    assert os.listdir() == ["mnist"]
    assert notebook(TEN_LINES)[1:] == (1, [])
    two = "train_cvae.__defaults__ = 2, *train_cvae.__defaults__[1:]  # epochs\n"
    for code in two + last, "\n".join([*definitions, two, last]):
        text, *rest = notebook(code)  # pictures: samples, losses, the 6s, 0 to 9, the styles
        assert "epoch 2/2" in text and rest == [5, []]
    stop = "import _thread, threading\nthreading.Timer(2, _thread.interrupt_main).start()"
    assert notebook(f"{stop}\nmodel = train_cvae(epochs=100_000)")[2] == ["KeyboardInterrupt"]
    epochs = load()["epoch"] + 1
    text, _, errors = notebook(f"model = train_cvae(epochs={epochs}, resume=True)")
    assert text.count("\nepoch ") == 1 and not errors and load()["epoch"] == epochs
    _, *rest = notebook(f'%run "{SCRIPT}" train {" ".join(options)} --epochs=1 --out-dir=run')
    assert rest == [2, []] and load("run")["epoch"] == 1
