"""The command line: options, messages, Ctrl-C, terminals, pipes, windows."""

import inspect
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CHECKPOINT, SCRIPT, load, run

import cvae_mnist
from cvae_mnist import UserError, inference_cvae, main, pick_device, restyle_cvae, say, train_cvae

SMALL = ["--h-dim", "16", "--z-dim", "2", "--device", "cpu"]
PICTURES = {"CVAE_loss.png", "CVAE_6.png", "CVAE_0-9.png", "CVAE_styles.png"}


@pytest.fixture
def calls(monkeypatch):
    """What the command line calls, as (function, arguments), instead of doing it."""
    calls = []
    for function in (train_cvae, inference_cvae, restyle_cvae):

        def call(*arguments, signature=inspect.signature(function), name=function.__name__, **options):
            calls.append((name, {**signature.bind(*arguments, **options).arguments}))

        call.__signature__ = inspect.signature(function)
        monkeypatch.setattr(cvae_mnist, function.__name__, call)
    monkeypatch.setattr(cvae_mnist, "load_checkpoint", lambda _: ({}, SimpleNamespace(num_classes=10)))
    return calls


# Options


@pytest.mark.parametrize(("arguments", "expected"), [
    ("", [("train_cvae", {}), ("inference_cvae", {"flag": True}), ("inference_cvae", {}), ("restyle_cvae", {})]),
    ("train --epochs 3 --batch-size 40 --learning-rate 0.01 --h-dim 8 --z-dim 4 --num-classes 0 --seed 5 --resume",
     [("train_cvae", dict(epochs=3, batch_size=40, learning_rate=0.01, h_dim=8, z_dim=4, num_classes=0, seed=5,
                          resume=True))]),
    ("--seed 1 --data-dir d --out-dir o --device cpu draw --digit 0 --temperature 0.5".replace("--data-dir d ", ""),
     [("inference_cvae", dict(input=0, flag=True, temperature=0.5, seed=1, out_dir="o", device="cpu"))]),
    ("draw --seed 1", [("inference_cvae", dict(seed=1, flag=True)), ("inference_cvae", dict(seed=1))]),
    ("--data-dir d --out-dir o restyle", [("restyle_cvae", dict(data_dir="d", out_dir="o"))]),
    ("--digit 3 --data-dir d", [("train_cvae", dict(data_dir="d")), ("inference_cvae", dict(input=3, flag=True)),
                                ("restyle_cvae", dict(data_dir="d"))]),
])  # fmt: skip
def test_options_mean_what_they_mean_in_python(calls, arguments, expected):
    main(arguments.split())
    assert calls == expected


def test_a_plain_vae_is_not_asked_for_a_digit(calls, monkeypatch):
    monkeypatch.setattr(cvae_mnist, "load_checkpoint", lambda _: ({}, SimpleNamespace(num_classes=0)))
    main(["draw"])
    assert calls == [("inference_cvae", {})]


@pytest.mark.parametrize(("arguments", "named"), [
    ("--epochs 0", "--epochs"), ("--epochs many", "--epochs"), ("--learning-rate nan", "--learning-rate"),
    ("--num-classes 5", "--num-classes"), ("--digit 12", "--digit"), ("--temperature inf", "--temperature"),
    ("--temperature -1", "--temperature"), ("fly", "fly"), ("--fast", "--fast"), ("train --digit 3", "--digit"),
    ("draw --data-dir x", "--data-dir"), ("restyle --seed 1", "--seed"), ("--num-classes 0 --digit 3", "--digit"),
])  # fmt: skip
def test_misuse_is_argparses_error(calls, capsys, arguments, named):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2 and calls == []
    assert named in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("arguments", ["draw", "train --device nonsense", "train --out-dir file"])
def test_what_the_user_can_mend_is_one_line(here, monkeypatch, arguments):
    (here / "file").touch()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code.startswith("cvae_mnist.py: error: ") and "\n" not in stop.value.code


# The whole job


def test_the_whole_job_in_a_folder_with_an_accent_on_an_ascii_output(data, here):
    done = run("--epochs", 2, "--data-dir", data, "--out-dir", "été", *SMALL, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"") and b"\r" not in done.stdout
    lines = done.stdout.decode().splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    pattern = r"epoch {}/2  loss \d+\.\d\d .*  test loss \d+\.\d\d  \d+\.\d s  0\.0 min left"
    assert [bool(re.fullmatch(pattern.format(n), line)) for n, line in enumerate(epochs, 1)] == [True, True]
    assert sum("CVAE on MNIST, epoch 2" in line for line in lines) == 5  # each picture is named
    assert {path.name for path in (here / "été").glob("*.png")} == PICTURES
    assert [path.name for path in here.iterdir()] == ["été"]


def test_the_time_left_is_that_of_the_epochs_to_come(quick, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 90))
    monkeypatch.setattr(cvae_mnist.time, "perf_counter", lambda: next(clock))
    train_cvae(**{**quick, "epochs": 3})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.split("  ")[-2:] for line in lines] == [["90.0 s", f"{left} min left"] for left in (3.0, 1.5, 0.0)]


# Standard output


def test_a_pipe_gets_each_line_at_once_and_ctrl_c_ends_without_a_traceback(data):
    import signal

    if os.name != "posix":
        pytest.skip("needs POSIX signals")
    command = [sys.executable, str(SCRIPT), "train", "--epochs", "100000", "--data-dir", str(data), *SMALL]
    listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731, background jobs do not
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=listen)
    while not process.stdout.readline().startswith(b"epoch 1/"):
        assert process.poll() is None
    assert load(".")["epoch"] < 1000  # the line came at once
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and errors.strip() == b"Interrupted" and load(".")["epoch"] >= 1


@pytest.mark.skipif(os.name != "posix", reason="a shell's pipes")
def test_where_a_pipes_reader_leaves_training_ends_quietly_with_a_checkpoint(data):
    command = f'"{sys.executable}" "{SCRIPT}" train --epochs 100000 --data-dir "{data}" {" ".join(SMALL)}'
    done = subprocess.run(f"{command} | head -n 4", shell=True, capture_output=True, timeout=100)
    assert done.stdout.count(b"epoch ") == 2 and done.stderr == b"" and load(".")["epoch"] >= 2


class WriteOnly:
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


class Gone(WriteOnly):
    """A terminal that is gone, or a full disk."""

    def write(self, text):
        raise OSError(5, "Input/output error")


def closed():
    file = open(os.devnull, "w")  # noqa: SIM115
    file.close()
    return file


@pytest.mark.parametrize("stdout", [lambda: None, WriteOnly, Gone, closed])
def test_whatever_stdout_is_training_goes_on(quick, here, monkeypatch, stdout):
    monkeypatch.setattr(sys, "stdout", stdout())
    train_cvae(**{**quick, "epochs": 1})
    assert load(here)["epoch"] == 1 and (here / "CVAE_loss.png").exists()
    if isinstance(sys.stdout, WriteOnly) and not isinstance(sys.stdout, Gone):
        assert "epoch 1/1" in sys.stdout.text


def test_a_character_that_stdout_lacks_is_escaped(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w+", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        say("Saved été")
        assert "Saved \\xe9t\\xe9" in (tmp_path / "out").read_text()


def test_on_a_terminal_a_live_line_becomes_one_line_per_epoch(data):
    pty = pytest.importorskip("pty", exc_type=ImportError)
    ours, theirs = pty.openpty()
    command = [sys.executable, str(SCRIPT), "train", "--epochs", "2", "--data-dir", str(data), *SMALL]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 10_000):
            seen += chunk
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    for epoch in (1, 2):  # what is overwritten is no longer than what overwrites it
        live = rf"epoch +{epoch - 1}\.\d\d/2  loss +\d+\.\d\d"
        match = re.search(rf"\n(({live}\r)+)(epoch {epoch}/2 .* left)\r\n", seen.decode())
        assert match and len(match[2]) < len(match[3])


# The device


def test_an_accelerator_that_cannot_compute_is_said_and_the_cpu_used(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert pick_device() == torch.device("cpu")
    assert "cannot use meta" in capsys.readouterr().out
    with pytest.raises(UserError, match="meta"):
        pick_device("meta")  # it was asked for


def test_an_accelerator_is_preferred_but_not_to_what_is_asked_for(monkeypatch):
    tried, real = [], torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device, **options: tried.append(str(device)) or real(*size, **options))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    pick_device(), pick_device("cpu")
    assert tried == ["cuda", "cpu"]


# Windows

FAKE_SCREEN = """
from pathlib import Path
import numpy
from matplotlib import _pylab_helpers
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg

class FigureManager(FigureManagerBase):
    def __init__(self, canvas, num):
        super().__init__(canvas, num)
        if Path("broken").exists():
            raise RuntimeError("no display name")

    @classmethod
    def pyplot_show(cls, *, block=None):
        for manager in _pylab_helpers.Gcf.get_all_fig_managers():
            manager.canvas.draw()
            ink = 255 - numpy.asarray(manager.canvas.buffer_rgba())[:, :, :3].mean()
            print("window", ink > 1)
        print("pictures", len(list(Path("out").glob("*.png"))))

class FigureCanvas(FigureCanvasAgg):
    required_interactive_framework = "headless"  # the one that matplotlib grants with a screen and without
    manager_class = FigureManager
"""


@pytest.fixture
def screen(tmp_path, here, trained, monkeypatch):
    """A matplotlib backend with windows, that prints what it shows, and a checkpoint in ./out."""
    (tmp_path / "fakescreen.py").write_text(FAKE_SCREEN)
    (here / "out").mkdir()
    (here / "out" / CHECKPOINT).write_bytes((trained / CHECKPOINT).read_bytes())
    monkeypatch.setenv("MPLBACKEND", "module://fakescreen")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_windows_show_this_runs_pictures_when_all_are_saved(screen, here):
    (here / "out" / "CVAE_9.png").write_bytes(b"of an earlier run")
    os.utime(here / "out" / "CVAE_9.png", (0, 0))
    done = run("draw", "--out-dir", "out", "--device", "cpu")
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0 and [line.split()[-1] for line in lines if line.startswith("window")] == ["True"] * 2
    assert lines[-1] == "pictures 3"


@pytest.mark.parametrize("backend", ["a toolkit that raises", "module://os", "agg"])
def test_where_windows_cannot_be_opened_the_run_has_succeeded(screen, here, trained, monkeypatch, capsys, backend):
    from matplotlib import pyplot as plt

    if backend == "a toolkit that raises":
        (here / "broken").touch()
        done = run("draw", "--out-dir", "out", "--device", "cpu")
        assert (done.returncode, done.stderr) == (0, b"") and str(here / "out") in done.stdout.decode()
    elif backend == "agg":
        main(["draw", "--out-dir", "out", "--device", "cpu"])
        assert "windows" not in capsys.readouterr().out and plt.get_fignums() == []
    else:
        monkeypatch.setattr(plt, "figure", lambda *_: plt.switch_backend(backend))
        main(["draw", "--out-dir", "out", "--device", "cpu"])
        assert str(here / "out") in capsys.readouterr().out
    assert (here / "out" / "CVAE_6.png").exists()


# As a module and under IPython


def test_importing_does_nothing(here):
    code = "import sys; sys.argv = []; import torch; a = torch.get_rng_state(); import cvae_mnist\n"
    code += "assert torch.equal(a, torch.get_rng_state()) and 'matplotlib.pyplot' not in sys.modules\n"
    code += "import os; print(os.environ['GOMP_SPINCOUNT'])"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "GOMP_SPINCOUNT": "77"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [b"77"], b"") and not any(here.iterdir())


@pytest.mark.parametrize("magic", ["", "-i "])
def test_ipythons_run_is_a_command_line(calls, data, monkeypatch, magic):
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    monkeypatch.setattr(sys, "argv", ["ipython"])
    assert not shell.run_cell(f'%run {magic}"{SCRIPT}" train --epochs 1 --data-dir "{data}" {" ".join(SMALL)}').error_in_exec
    assert load(".")["epoch"] == 1 and not Path("CVAE_6.png").exists()
