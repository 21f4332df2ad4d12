"""How it is used: the command line, pipes, Ctrl-C, an import, a notebook, %run."""

import inspect
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock, call, create_autospec

import matplotlib
import pytest
import torch
from conftest import SCRIPT, SOURCE, load

import cvae_mnist
from cvae_mnist import UserError, main, pick_device


def test_each_step_gets_its_options_and_the_signatures_defaults(monkeypatch):
    job = Mock()
    for name in "train_cvae", "inference_cvae", "restyle_cvae":
        job.attach_mock(create_autospec(getattr(cvae_mnist, name)), name)
        monkeypatch.setattr(cvae_mnist, name, getattr(job, name))
    train, draw, restyle = call.train_cvae, call.inference_cvae, call.restyle_cvae
    parameters = inspect.signature(cvae_mnist.train_cvae).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.name != "seed"}
    given = {"epochs": 3, "batch_size": 40, "learning_rate": 0.01, "h_dim": 8, "z_dim": 4}
    given |= {"num_classes": 0, "dataset": "KMNIST", "data_dir": "d", "out_dir": "o", "seed": 5}
    given |= {"device": "cpu"}
    every = " ".join(f"--{name.replace('_', '-')}={value}" for name, value in given.items())
    both = [draw(6, True, 1.0, None, "."), draw(6, False, 1.0, None, ".")]
    expected = {
        "": [train(**defaults), *both, restyle(None, "./mnist", ".")],
        "draw": both,
        "draw --digit 0 --temperature 0.5 --seed 1": [draw(0, True, 0.5, 1, ".")],
        "--out-dir o draw --digit 3 --epochs 9": [draw(3, True, 1.0, None, "o")],
        "--data-dir d --out-dir o restyle": [restyle(None, "d", "o")],
        f"train --resume {every}": [train(**given, resume=True)],
    }
    for arguments, calls in expected.items():
        job.mock_calls.clear()
        main(arguments.split())
        assert job.mock_calls == calls


def test_errors_are_argparses_or_one_line_but_a_bug_has_a_traceback(trained, monkeypatch):
    for arguments in "train --epochs many", "draw --digit 12", "train --dataset X", "fly", "--fast":
        stop = pytest.raises(SystemExit, main, arguments.split())
        assert stop.value.code == 2 and not os.listdir()
    for arguments in "draw", "train --epochs 0", "train --device x", f"--out-dir {os.devnull}":
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split()])
        stop = pytest.raises(SystemExit, runpy.run_path, str(SCRIPT), run_name="__main__")
        assert re.fullmatch("cvae_mnist.py: error: .+", stop.value.code)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "draw", f"--out-dir={trained}"])
    monkeypatch.setattr(torch.nn.functional, "relu", Mock(side_effect=ValueError))
    pytest.raises(ValueError, runpy.run_path, str(SCRIPT), run_name="__main__")


@pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="needs an accent in a path")
def test_the_whole_job_in_a_folder_with_an_accent_on_an_ascii_output(options, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    command = [sys.executable, SCRIPT, *options, "--epochs=2", "--out-dir=été"]
    lines = subprocess.check_output(command, text=True, timeout=100).splitlines()
    number = r"\d+\.\d+"
    form = rf"epoch \d/2  loss {number} \(.*{number}.*\)  test loss {number}  {number} s  .* left"
    epochs = [line for line in lines if re.fullmatch(form, line)]
    assert [line[:9] for line in epochs] == ["epoch 1/2", "epoch 2/2"]
    assert sum(line.startswith("Saved") and r"\xe9t\xe9" in line for line in lines) == 5
    pictures = sorted(path.name for path in Path("été").glob("*.png"))
    assert pictures == ["CVAE_0-9.png", "CVAE_6.png", "CVAE_loss.png", "CVAE_styles.png"]
    assert os.listdir() == ["été"]


@pytest.mark.skipif(os.name != "posix", reason="a shell's pipes and signals")
def test_lines_come_at_once_a_pipe_may_close_and_ctrl_c_ends_a_shells_loop_of_runs(options):
    script = f'"{sys.executable}" "{SCRIPT}" train {" ".join(options)} --epochs 100000'
    command = f"{script} | head -n 4; for run in 1 2 3; do echo run $run; {script}; done"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    shell = subprocess.Popen(["bash", "-c", command], start_new_session=True, **pipes)
    lines = list(iter(shell.stdout.readline, "run 1\n"))
    assert [line[:14] for line in lines[2:]] == ["epoch 1/100000", "epoch 2/100000"]
    assert 2 <= load()["epoch"] < 20  # a buffer holds 70 lines
    assert any(line.startswith("epoch 1/100000") for line in iter(shell.stdout.readline, ""))
    os.killpg(shell.pid, signal.SIGINT)
    output, errors = shell.communicate(timeout=60)
    assert shell.returncode and "run 2" not in output and "KeyboardInterrupt" in errors
    assert load()["epoch"] >= 1


def test_an_accelerator_is_tried_first_unless_another_device_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert pick_device("cpu") == torch.device("cpu") and capsys.readouterr().out == ""
    assert pick_device() == torch.device("cpu")  # meta tensors hold no numbers
    assert "cannot use meta" in capsys.readouterr().out
    pytest.raises(UserError, pick_device, "meta").match("meta")


def test_importing_sets_how_threads_wait_and_does_nothing_else(monkeypatch, capsys):
    settings, random_state = dict(matplotlib.rcParams.copy()), torch.get_rng_state()
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    runpy.run_path(str(SCRIPT))
    assert os.environ["GOMP_SPINCOUNT"] == "77" and capsys.readouterr() == ("", "")
    assert settings == dict(matplotlib.rcParams.copy()) and not os.listdir()
    assert torch.equal(random_state, torch.get_rng_state())
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setitem(sys.modules, "torch", None)
    pytest.raises(ImportError, runpy.run_path, str(SCRIPT))  # it is set before this
    assert "GOMP_SPINCOUNT" in os.environ


def test_options_are_options_unless_they_are_a_notebooks_kernels_own(monkeypatch):
    """Here `draw` ends at once, for there is no checkpoint; training begins with a seed."""
    monkeypatch.setattr(torch, "manual_seed", Mock(side_effect=NotImplementedError))
    monkeypatch.setattr(sys, "argv", ["", "draw"])
    monkeypatch.setattr(sys, "stdout", None)
    with zipfile.ZipFile("app.pyz", "w") as app:
        app.write(SCRIPT, "__main__.py")
    module = partial(runpy.run_module, "cvae_mnist", alter_sys=True)
    for start in module, partial(runpy.run_path, "app.pyz"):
        pytest.raises(SystemExit, start, run_name="__main__").match("Checkpoint not found")
    code = compile(SOURCE, "a cell", "exec")
    scripts = ["-", "mine.py", "ipykernel/mine/mine.py"]
    kernels = ["ipykernel_launcher.py", "colab_kernel_launcher.py", "ipykernel/__main__.py"]
    ends = dict.fromkeys(scripts, SystemExit)
    ends |= dict.fromkeys([*kernels, "pydevconsole.py"], NotImplementedError)
    for program, end in ends.items():
        monkeypatch.setattr(sys, "argv", [str(Path("lib", program)), "draw"])
        pytest.raises(end, exec, code, {"__name__": "__main__"})


@pytest.fixture
def notebook(tmp_path, data, monkeypatch):
    """notebook(code) runs a cell in Jupyter; returns its text, number of pictures, errors."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
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


def test_cell_by_cell_only_the_last_starts_the_job_which_can_be_interrupted_and_resumed(notebook):
    cells = pytest.importorskip("jupytext").reads(SOURCE, fmt="py:percent").cells
    assert [cell.cell_type for cell in cells] == ["markdown", "code"] * (len(cells) // 2)
    *definitions, last = [cell.source for cell in cells[1::2]]
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


def test_run_takes_options_and_pasted_into_one_cell_it_does_the_whole_job(notebook, options):
    _, *rest = notebook(f'%run "{SCRIPT}" train {" ".join(options)} --epochs=1')
    assert rest == [2, []] and load()["epoch"] == 1
    first = "train_cvae.__defaults__ = 1, *train_cvae.__defaults__[1:]  # one epoch"
    cells = SOURCE.split("if __name__")
    text, *rest = notebook(f"{cells[0]}{first}\nif __name__{cells[1]}")
    assert "epoch 1/1" in text and rest == [5, []]
