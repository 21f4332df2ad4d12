"""The file as a notebook: pasted into one cell, or cell by cell."""

import json
import re
import sys

import jupytext
import nbclient
import nbformat
import pytest
from conftest import SOURCE, load


@pytest.fixture
def notebook(tmp_path, here, monkeypatch):
    """notebook(code) runs a cell in a fresh Jupyter kernel of this very Python; returns its outputs."""
    spec = tmp_path / "jupyter" / "kernels" / "this-python" / "kernel.json"
    spec.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": command, "display_name": "this Python", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND")  # the kernel chooses its own
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(), kernel_name="this-python", allow_errors=True,
                                     timeout=100, resources={"metadata": {"path": str(here)}})

    def execute(code):
        client.nb.cells.append(nbformat.v4.new_code_cell(code))
        return client.execute_cell(client.nb.cells[-1], len(client.nb.cells) - 1).outputs

    with client.setup_kernel():
        yield execute


def printed(outputs):
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(outputs):
    return sum("image/png" in output.get("data", {}) for output in outputs)


def errors(outputs):
    return [output.ename for output in outputs if output.output_type == "error"]


def test_text_and_code_alternate():
    cells = jupytext.reads(SOURCE, fmt="py:percent").cells
    assert [cell.cell_type for cell in cells] == ["markdown", "code"] * (len(cells) // 2) and len(cells) > 10


def test_cells_define_the_ten_lines_train_and_the_last_cell_does_the_whole_job(notebook, here, data):
    *definitions, last = [cell.source for cell in jupytext.reads(SOURCE, fmt="py:percent").cells
                          if cell.cell_type == "code"]
    for source in definitions:
        assert notebook(source) == []
    assert not any(here.iterdir())

    [lines] = re.findall(r"# ```python\n((?:# .*\n)*)# ```", SOURCE)
    lines = lines.replace("# ", "", 1).replace("\n# ", "\n").replace("./mnist", str(data)).replace("range(10):", "range(1):")
    outputs = notebook(lines)
    assert not errors(outputs) and pictures(outputs) == 1

    outputs = notebook(f"import inspect\ntrain_cvae.__defaults__ = (2, 256, 3e-3, 16, 2, 10, {str(data)!r}, *train_cvae.__defaults__[7:])\n"
                       f"restyle_cvae.__defaults__ = (None, {str(data)!r}, '.', None)")
    outputs = notebook(last)
    assert not errors(outputs) and "epoch 2/2" in printed(outputs) and "\r" not in printed(outputs)
    assert pictures(outputs) == 5  # the samples, the losses, the 6s, 0 to 9, the styles
    assert errors(notebook("inference_cvae(flag=True, input=12)")) == ["UserError"]  # and the next cell runs

    interrupted = """
import _thread, threading
threading.Thread(target=lambda: (time.sleep(2), _thread.interrupt_main())).start()  # what the stop button does
model = train_cvae(epochs=100_000)
"""
    assert errors(notebook(interrupted)) == ["KeyboardInterrupt"]
    epoch = load(here)["epoch"]
    outputs = notebook(f"model = train_cvae(epochs={epoch + 1}, resume=True)")
    assert not errors(outputs) and printed(outputs).count("\nepoch ") == 1 and load(here)["epoch"] == epoch + 1


def test_pasted_into_one_cell_it_does_the_whole_job(notebook, here, data):
    text = SOURCE.replace("epochs=100, batch_size=256, learning_rate=3e-3, h_dim=600", "epochs=1, batch_size=256, learning_rate=3e-3, h_dim=16")
    outputs = notebook(text.replace('"./mnist"', repr(str(data))))
    assert not errors(outputs) and "epoch 1/1" in printed(outputs) and pictures(outputs) == 5
