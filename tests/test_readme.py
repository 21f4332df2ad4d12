"""What README.md says is so: its Python runs, its commands and tables fit the code."""

import inspect
import re
import subprocess
import sys
import tomllib

from conftest import ROOT, SCRIPT
from PIL import Image

import cvae_mnist

README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTIONS = {"--" + name.replace("_", "-") for name in cvae_mnist.ARGUMENTS}
OPTIONS = OPTIONS - {"--input", "--flag", "--indices"} | {"--digit"}
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_every_python_block_runs(data_dir, tmp_path, monkeypatch, capsys):
    """In order, in one folder, as a reader would paste them; only the training is made short."""
    assert len(BLOCKS) >= 4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").symlink_to(data_dir, target_is_directory=True)
    for number, block in enumerate(BLOCKS):
        exec(compile(re.sub(r"epochs=\d+", "epochs=1", block), f"README block {number}", "exec"), {})
    pictures = {"latent.png", "walk.gif", "temperature.png", "CVAE_3.png", "CVAE_styles.png"}
    assert pictures <= {path.name for path in tmp_path.iterdir()}
    with Image.open(tmp_path / "walk.gif") as walk:
        assert walk.n_frames > 20


def test_pictures_exist_and_are_small():
    names = re.findall(r"\]\((\.github/[^)]+)\)", README)
    assert names and sum((ROOT / name).stat().st_size for name in names) < 500_000
    assert {path.name for path in (ROOT / ".github").iterdir()} == {name.split("/")[1] for name in names}


def test_options_table_has_every_option_and_its_default():
    table = README.split("## Options")[1].split("##")[0]
    assert set(re.findall(r"`(--[a-z-]+)`", table)) == {"--help", *OPTIONS}
    defaults = {name: p.default for name, p in inspect.signature(cvae_mnist.train_cvae).parameters.items()}
    for name in ("epochs", "batch_size", "learning_rate", "num_classes", "seed"):
        assert f"| `--{name.replace('_', '-')}` | {defaults[name]} |" in table
    assert f"| {defaults['h_dim']}, {defaults['z_dim']} |" in table


def test_one_line_header_asks_for_what_requirements_ask_for():
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", SCRIPT.read_text(encoding="utf-8"))
    header = tomllib.loads("".join(line[2:] for line in block["content"].splitlines(keepends=True)))
    assert header["dependencies"] == (ROOT / "requirements.txt").read_text().split()
    assert header["requires-python"] == ">=3.11" and "Python 3.11 or newer" in README


def test_help_names_every_step_and_option():
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    for word in ("train", "draw", "restyle", *OPTIONS):
        assert word in done.stdout
