"""The command line: options, messages, Ctrl-C, terminals, pipes, windows."""

import atexit
import contextlib
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock, call, create_autospec

import pytest
import torch
from conftest import CHECKPOINT, SCRIPT, load, run
from matplotlib import pyplot as plt
from matplotlib.backends.backend_svg import FigureCanvasSVG

import cvae_mnist
from cvae_mnist import UserError, inference_cvae, main, pick_device, restyle_cvae

DRAW = ["draw", "--out-dir", "out", "--device", "cpu"]
train_, draw, restyle = call.train_cvae, call.inference_cvae, call.restyle_cvae


@pytest.fixture
def job(monkeypatch):
    """job.mock_calls are what the command line calls, instead of doing it."""
    job = Mock()
    for name in "train_cvae", "inference_cvae", "restyle_cvae":
        job.attach_mock(create_autospec(getattr(cvae_mnist, name)), name)
        monkeypatch.setattr(cvae_mnist, name, getattr(job, name))
    job.model.num_classes = 10
    monkeypatch.setattr(cvae_mnist, "load_checkpoint", lambda _: ({}, job.model))
    return job


@pytest.mark.parametrize(("arguments", "expected"), [
    ("", [train_(), draw(flag=True), draw(), restyle()]),
    ("--digit 3 --data-dir d",
     [train_(data_dir="d"), draw(input=3, flag=True), restyle(data_dir="d")]),
    ("draw --seed 1", [draw(seed=1, flag=True), draw(seed=1)]),
    ("--seed 1 --out-dir o --device cpu draw --digit 0 --temperature 0.5",
     [draw(input=0, flag=True, temperature=0.5, seed=1, out_dir="o", device="cpu")]),
    ("--data-dir d --out-dir o restyle", [restyle(data_dir="d", out_dir="o")]),
    ("train --epochs 3 --batch-size 40 --learning-rate 0.01 --h-dim 8 --z-dim 4 --num-classes 0 "
     "--seed 5 --resume", [train_(epochs=3, batch_size=40, learning_rate=0.01, h_dim=8, z_dim=4,
                                  num_classes=0, seed=5, resume=True)])])
def test_options_mean_what_they_mean_in_python(job, arguments, expected):
    main(arguments.split())
    assert job.mock_calls == expected


def test_a_plain_vae_is_asked_for_a_digit_only_if_the_user_does(job):
    job.model.num_classes = 0
    main(["draw"])
    main(["draw", "--digit", "3"])  # an error, see test_draw
    assert job.mock_calls == [draw(), draw(input=3, flag=True)]


@pytest.mark.parametrize("arguments", [
    "--epochs 0", "--epochs many", "--learning-rate nan", "--num-classes 5", "--digit 12",
    "--temperature inf", "--temperature -1", "fly", "--fast", "--digit 3 train",
    "--data-dir x draw", "--seed 1 restyle", "--digit 3 --num-classes 0"])
def test_misuse_is_argparses_error_and_names_the_option(job, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2 and job.mock_calls == []
    assert arguments.split()[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("arguments", ["draw", "train --device x", f"train --out-dir {os.devnull}"])
def test_what_the_user_can_mend_is_one_line(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert re.fullmatch("cvae_mnist.py: error: .+", stop.value.code)


@pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="needs an accent in a path")
def test_the_whole_job_in_a_folder_with_an_accent_on_an_ascii_output(options, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run(*options, "--epochs=2", "--out-dir=été")
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode().replace(os.linesep, "\n")
    assert "\r" not in text
    lines = text.split("\n")
    epochs = [line for line in lines if re.fullmatch(
        r"epoch \d/2  loss \d+\.\d\d .*  test loss \d+\.\d\d  \d+\.\d s  \d+\.\d min left", line)]
    assert [line[:9] for line in epochs] == ["epoch 1/2", "epoch 2/2"]
    assert sum(r"\xe9t\xe9" in line and "CVAE on MNIST, epoch 2" in line for line in lines) == 5
    pictures = sorted(path.name for path in Path("été").glob("*.png"))
    assert pictures == ["CVAE_0-9.png", "CVAE_6.png", "CVAE_loss.png", "CVAE_styles.png"]
    assert os.listdir() == ["été"]


def test_the_time_left_is_that_of_the_epochs_to_come(train, monkeypatch, capsys):
    clock = Mock(wraps=time, perf_counter=Mock(side_effect=range(0, 900, 90)))
    monkeypatch.setattr(cvae_mnist, "time", clock)
    train(epochs=3)
    times = re.findall(r"\nepoch .*  (.*)  (.*)", capsys.readouterr().out)
    assert times == [("90.0 s", f"{minutes} min left") for minutes in (3.0, 1.5, 0.0)]


def test_on_a_terminal_a_live_line_becomes_one_line_per_epoch_and_ctrl_c_ends_quietly(options):
    ours, theirs = pytest.importorskip("pty").openpty()
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "train", *options, "--epochs=100000"],
        stdout=theirs, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    os.close(theirs)
    with open(ours, newline="\n") as terminal:
        _, _, *lines = [terminal.readline() for _ in range(4)]
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
            terminal.read()
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and errors.strip() == b"Interrupted" and load()["epoch"] >= 2
    for epoch, line in enumerate(lines, 1):
        *live, last = line.removesuffix("\r\n").split("\r")
        assert live and last.startswith(f"epoch {epoch}/100000  ")
        for text in live:  # it is overwritten, so it must not be longer
            assert re.fullmatch(rf"epoch +{epoch - 1}\.\d\d/100000  loss +\d+\.\d\d", text)
            assert len(text) < len(last)


@pytest.mark.skipif(os.name != "posix", reason="a shell's pipes")
def test_where_a_pipes_reader_leaves_training_ends_quietly_with_a_checkpoint(data):
    command = f'"{sys.executable}" "{SCRIPT}" train --device cpu --data-dir "{data}" | head -n 4'
    done = subprocess.run(command, shell=True, capture_output=True, timeout=100)
    assert done.stdout.count(b"epoch ") == 2 and done.stderr == b"" and load()["epoch"] >= 2


def test_whatever_stdout_is_training_goes_on_and_each_line_comes_at_once(train, monkeypatch):
    gone = Mock(**{"write.side_effect": OSError(5, "Input/output error")})
    write_only = Mock(spec=["write"])
    with open("closed", "w") as closed, open("log", "w") as log:
        closed.close()
        for epochs, stdout in enumerate([None, closed, gone, write_only, log], 1):
            monkeypatch.setattr(sys, "stdout", stdout)
            train(epochs=epochs)
            assert load()["epoch"] == epochs
            Path("CVAE_loss.png").unlink()
        assert "epoch 5/5" in Path("log").read_text()  # before the file is closed
    assert "epoch 4/4" in str(write_only.mock_calls)


def test_an_accelerator_is_tried_first_unless_another_device_is_asked_for(
        trained, data, monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert pick_device("cpu") == torch.device("cpu") and capsys.readouterr().out == ""
    assert pick_device() == torch.device("cpu")
    inference_cvae(out_dir=trained)
    restyle_cvae(data_dir=data, out_dir=trained)
    assert capsys.readouterr().out.count("cannot use meta") == 3
    with pytest.raises(UserError, match="meta"):
        pick_device("meta")


def test_windows_show_this_runs_pictures_when_all_are_saved(trained, monkeypatch, capsys):
    out, shown = Path("out"), []
    out.mkdir()
    shutil.copy(trained / CHECKPOINT, out)
    (out / "CVAE_loss.png").touch()  # an earlier run's
    plt.close("all")
    monkeypatch.setattr(plt, "show", lambda: shown.append(len(list(out.glob("*.png")))))
    plt.switch_backend("svg")
    main(DRAW)  # without a screen
    assert "windows" not in capsys.readouterr().out and plt.get_fignums() == shown == []
    monkeypatch.setattr(FigureCanvasSVG, "required_interactive_framework", "headless")
    main(DRAW)
    assert shown == [3] and sorted(plt.get_figlabels()) == ["CVAE_0-9.png", "CVAE_6.png"]
    for name in plt.get_figlabels():
        assert (plt.figure(name).images[0].get_array() == plt.imread(out / name)).all()
    plt.close("all")
    plt.switch_backend("agg")


def test_where_windows_cannot_be_opened_the_run_has_succeeded(trained, monkeypatch, capsys):
    out = Path("out")
    out.mkdir()
    shutil.copy(trained / CHECKPOINT, out)
    monkeypatch.setattr(plt, "figure", Mock(side_effect=Exception("no toolkit")))
    main(DRAW)
    output, errors = capsys.readouterr()
    assert str(out.resolve()) in output and errors == "" and (out / "CVAE_6.png").exists()


def test_importing_does_nothing(monkeypatch):
    code = ("import os, sys, matplotlib as mpl, torch; sys.argv = []; rng = torch.get_rng_state()\n"
            "import cvae_mnist; print(torch.equal(rng, torch.get_rng_state()), "
            "'matplotlib.pyplot' in sys.modules, mpl.get_backend(), os.getenv('GOMP_SPINCOUNT'))")
    mine = {"PYTHONPATH": str(SCRIPT.parent), "GOMP_SPINCOUNT": "77", "MPLBACKEND": "svg"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | mine)
    assert (done.returncode, done.stderr) == (0, b"") and not os.listdir()
    assert done.stdout.split() == [b"True", b"False", b"svg", b"77"]


@pytest.mark.parametrize("magic", ["", "-i "])
def test_ipythons_run_is_a_command_line(options, magic):
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    atexit.unregister(shell.atexit_operations)  # it would write its history
    command = f'%run {magic}"{SCRIPT}" train {" ".join(options)} --epochs 1'
    assert not shell.run_cell(command).error_in_exec
    assert load()["epoch"] == 1 and not Path("CVAE_6.png").exists()
