"""The command line: options, messages, Ctrl-C, pipes, where sys.argv is for us and where not."""

import inspect
import itertools
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from unittest.mock import Mock, call, create_autospec

import pytest
import torch
from conftest import ROOT, SCRIPT, load, run

import cvae_mnist
from cvae_mnist import UserError, main, pick_device

posix = pytest.mark.skipif(os.name != "posix", reason="a shell's pipes and signals")
draw, restyle = call.inference_cvae, call.restyle_cvae


@pytest.fixture
def job(monkeypatch):
    """job.mock_calls are what the command line calls, instead of doing it."""
    job = Mock()
    for name in "train_cvae", "inference_cvae", "restyle_cvae":
        job.attach_mock(create_autospec(getattr(cvae_mnist, name)), name)
        monkeypatch.setattr(cvae_mnist, name, getattr(job, name))
    return job


@pytest.mark.parametrize(
    ("arguments", "drawn"),
    [
        ("draw", [draw(6, True, 1.0, None, "."), draw(6, False, 1.0, None, ".")]),
        ("draw --digit 0 --temperature 0.5 --seed 1", [draw(0, True, 0.5, 1, ".")]),
        ("--out-dir o draw --digit 3 --epochs 9", [draw(3, True, 1.0, None, "o")]),
        ("--data-dir d --out-dir o restyle", [restyle(None, "d", "o")]),
    ],
)
def test_a_part_of_the_job_is_done_with_its_options(job, arguments, drawn):
    main(arguments.split())
    assert job.mock_calls == drawn


def test_the_whole_job_trains_draws_and_restyles_with_the_signatures_defaults(job):
    parameters = inspect.signature(cvae_mnist.train_cvae).parameters.values()
    main([])
    train, *drawn = job.mock_calls
    assert {"seed": 0, **train.kwargs} == {each.name: each.default for each in parameters}
    pictures = [draw(6, flag, 1.0, None, ".") for flag in (True, False)]
    assert drawn == [*pictures, restyle(None, "./mnist", ".")]


def test_training_takes_every_option(job):
    options = {"epochs": 3, "batch_size": 40, "learning_rate": 0.01, "h_dim": 8, "z_dim": 4}
    options |= {"num_classes": 0, "dataset": "KMNIST", "data_dir": "d", "out_dir": "o", "seed": 5}
    options |= {"device": "cpu"}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    main(["train", "--resume", *given])
    assert job.mock_calls == [call.train_cvae(**options, resume=True)]


@pytest.mark.parametrize(
    "arguments", ["--epochs many", "--digit 12", "--dataset X", "fly", "--fast"]
)
def test_misuse_is_argparses_error(job, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2 and job.mock_calls == []


@pytest.mark.parametrize(
    "arguments", ["draw", "train --epochs 0", "train --device x", f"train --out-dir {os.devnull}"]
)
def test_what_the_user_can_mend_is_one_line(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert re.fullmatch("cvae_mnist.py: error: .+", stop.value.code)


@pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="needs an accent in a path")
def test_the_whole_job_in_a_folder_with_an_accent_on_an_ascii_output(options, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run(SCRIPT, *options, "--epochs=2", "--out-dir=été")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    number, seconds = r"\d+\.\d\d", r"  \d+\.\d s  \d+\.\d min left"
    epoch = rf"epoch \d/2  loss {number} \(.*{number}.*\)  test loss {number}{seconds}"
    epochs = [line for line in lines if re.fullmatch(epoch, line)]
    assert [line[:9] for line in epochs] == ["epoch 1/2", "epoch 2/2"]
    assert sum(line.startswith("Saved") and r"\xe9t\xe9" in line for line in lines) == 5
    pictures = sorted(path.name for path in Path("été").glob("*.png"))
    assert pictures == ["CVAE_0-9.png", "CVAE_6.png", "CVAE_loss.png", "CVAE_styles.png"]
    assert os.listdir() == ["été"]


def test_the_time_left_is_that_of_the_epochs_to_come(train, monkeypatch, capsys):
    monkeypatch.setattr(time, "perf_counter", Mock(side_effect=itertools.count(0, 90)))
    train(epochs=3)
    times = re.findall(r"\nepoch .*  (.*)  (.*)", capsys.readouterr().out)
    assert times == [("90.0 s", f"{minutes} min left") for minutes in (3.0, 1.5, 0.0)]


def processes(options, command):
    """Starts a shell's command; {} is the script that trains for very long."""
    script = f'"{sys.executable}" "{SCRIPT}" train {" ".join(options)} --epochs 100000'
    pipe = subprocess.PIPE
    return subprocess.Popen(
        ["bash", "-c", command.format(script)], stdout=pipe, stderr=pipe, text=True,
        start_new_session=True,
    )  # fmt: skip


@posix
def test_each_epochs_line_comes_at_once_and_ctrl_c_ends_a_shells_loop_of_runs(options):
    shell = processes(options, "for run in 1 2 3; do echo run $run; {}; done")
    lines = iter(shell.stdout.readline, "")
    assert next(line for line in lines if line.startswith("epoch 1/100000"))
    os.killpg(shell.pid, signal.SIGINT)
    output, errors = shell.communicate(timeout=60)
    assert shell.returncode and "run 2" not in output and "KeyboardInterrupt" in errors
    assert load()["epoch"] >= 1


@posix
def test_where_a_pipes_reader_leaves_training_ends_with_a_checkpoint(options):
    shell = processes(options, "{} | head -n 4")
    output, _ = shell.communicate(timeout=60)
    assert output.count("epoch ") == 2 and load()["epoch"] >= 2


def test_without_a_stdout_training_works(train, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    train(epochs=1)
    assert load()["epoch"] == 1


def test_an_accelerator_is_tried_first_unless_another_device_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert pick_device("cpu") == torch.device("cpu") and capsys.readouterr().out == ""
    assert pick_device() == torch.device("cpu")  # meta tensors hold no numbers
    assert "cannot use meta" in capsys.readouterr().out
    with pytest.raises(UserError, match="meta"):
        pick_device("meta")


def test_importing_does_nothing(monkeypatch):
    code = (
        "import os, sys, matplotlib as mpl, torch; rng = torch.get_rng_state(); import cvae_mnist\n"
        "print(torch.equal(rng, torch.get_rng_state()), 'matplotlib.pyplot' in sys.modules)\n"
        "print(mpl.get_backend(), os.getenv('GOMP_SPINCOUNT'))"
    )
    mine = {"PYTHONPATH": str(ROOT), "GOMP_SPINCOUNT": "77", "MPLBACKEND": "svg"}
    done = run("-c", code, env=os.environ | mine)
    assert done.returncode == 0 and not os.listdir()
    assert done.stdout.split() == ["True", "False", "svg", "77"]


@pytest.mark.parametrize("way", ["standard input", "-m", "zipapp", "%run"])
def test_options_are_options_however_the_script_is_started(options, way):
    arguments = ["train", *options, "--epochs=1"]
    if way == "standard input":
        run("-", *arguments, input=SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    elif way == "-m":
        run("-m", "cvae_mnist", *arguments, env={**os.environ, "PYTHONPATH": str(ROOT)})
    elif way == "zipapp":
        with zipfile.ZipFile("app.pyz", "w") as app:
            app.write(SCRIPT, "__main__.py")
        run("app.pyz", *arguments)
    else:
        pytest.importorskip("IPython")
        run("-m", "IPython", "--quick", "-c", f'%run "{SCRIPT}" {" ".join(arguments)}')
    assert load()["epoch"] == 1 and not Path("CVAE_6.png").exists()


@pytest.mark.parametrize(
    "program",
    [
        "ipykernel_launcher.py",
        "colab_kernel_launcher.py",
        "ipykernel/__main__.py",
        "pydevconsole.py",
    ],
)
def test_the_arguments_of_a_notebooks_kernel_are_not_for_us(monkeypatch, program):
    monkeypatch.setattr(sys, "argv", [str(Path("lib", program)), "-f", "kernel.json"])
    stop = Mock(side_effect=InterruptedError("the whole job has begun"))
    monkeypatch.setattr(torch, "manual_seed", stop)
    code = compile(SCRIPT.read_text(encoding="utf-8"), "a cell", "exec")
    with pytest.raises(InterruptedError):
        exec(code, {"__name__": "__main__"})
