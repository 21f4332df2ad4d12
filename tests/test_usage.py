"""How it is used: the command line, its errors, pipes, Ctrl-C, devices, an import."""

import inspect
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import matplotlib
import pytest
import torch
from conftest import SCRIPT, load

import cvae_mnist
from cvae_mnist import UserError, main, pick_device


def test_each_job_gets_its_options_and_the_signatures_defaults(watch):
    parameters = inspect.signature(cvae_mnist.train_cvae).parameters
    train = {name: parameter.default for name, parameter in parameters.items()}
    every = "train --resume --epochs 3 --batch-size 40 --learning-rate 0.01 --h-dim 8 --z-dim 4"
    every += " --num-classes 0 --dataset KMNIST --data-dir d --out-dir o --seed 5 --device cpu"
    given = [3, 40, 0.01, 8, 4, 0, "KMNIST", "d", "o", 5, True, "cpu"]  # in the signature's order
    draw = {"input": 6, "flag": True, "temperature": 1.0, "seed": 5, "out_dir": "."}
    restyle = {"indices": None, "data_dir": "./mnist", "out_dir": "."}
    expected = {
        "--seed=5": [{**train, "seed": 5}, draw, {**draw, "flag": False}, restyle],
        "train": [train],
        every: [dict(zip(train, given, strict=True))],
        "draw --seed=5": [draw, {**draw, "flag": False}],
        "draw --digit 0 --temperature 0.5 --seed=5": [{**draw, "input": 0, "temperature": 0.5}],
        "--out-dir o draw --digit=6 --seed 5 --epochs 9": [{**draw, "out_dir": "o"}],
        "--data-dir d --out-dir o restyle": [{**restyle, "data_dir": "d", "out_dir": "o"}],
    }
    jobs = [watch(name, run=False) for name in ("train_cvae", "inference_cvae", "restyle_cvae")]
    for arguments, calls in expected.items():
        main(arguments.split())
        assert sum(jobs, []) == calls
        for job in jobs:
            job.clear()


def test_errors_are_argparses_or_one_line_but_a_bug_has_a_traceback(trained, monkeypatch, capsys):
    wrong = {"draw --digit 12": "--digit", "train --dataset X": "--dataset", "fly": "train.*draw"}
    wrong |= {"--digit 3": " draw ", "--temperature 1.0": " draw "}
    for arguments, named in wrong.items():
        stop = pytest.raises(SystemExit, main, arguments.split())
        assert stop.value.code == 2 and not os.listdir()
        assert re.search(named, capsys.readouterr().err.splitlines()[-1])
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
    seconds, minutes = map(float, re.findall(r"  ([\d.]+) (?:s|min)", lines[2]))
    assert 0 < 60 * minutes / 99999 == pytest.approx(seconds, abs=0.051) and seconds < 50
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
    monkeypatch.setattr(torch.Tensor, "cpu", Mock(side_effect=RuntimeError))  # without a text
    assert pick_device() == torch.device("cpu")
    assert "cannot use meta: RuntimeError" in capsys.readouterr().out


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
