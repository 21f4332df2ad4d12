"""README.md: its blocks run; its options, versions and pictures are those of the code."""

import inspect
import re
from pathlib import Path

from conftest import ROOT, SOURCE
from PIL import Image, ImageDraw
from torchvision.transforms.functional import pil_to_tensor

import cvae_mnist

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_every_python_block_runs_in_order(data, monkeypatch, capsys):
    """As a reader would paste them; only epochs and images are fewer."""
    load = cvae_mnist.load_digits
    monkeypatch.setattr(cvae_mnist, "load_digits", lambda _: load(data))
    cvae_mnist.train_cvae(1, device="cpu")
    picture = Image.new("RGBA", (300, 200))  # transparent
    ImageDraw.Draw(picture).line([(60, 30), (150, 30), (110, 170)], fill="black", width=18)
    picture.save("my_digit.png")
    for number, block in enumerate(BLOCKS):
        exec(compile(block.replace("epochs=10", "epochs=1"), f"block {number}", "exec"), {})
    assert len(BLOCKS) == 5
    assert all(Path(name).exists() for name in ("latent.png", "walk.gif", "ten/CVAE_3.png"))
    own = pil_to_tensor(Image.open("own.png"))[0, :84, :84] / 255  # the digit, black on white
    assert own[:20].mean() > 0.9 > 0.5 > own[24:29, 30:55].mean()
    output = capsys.readouterr().out
    assert re.search(r"\d\.\d% are right", output) and "of 50 dimensions are in use" in output


def test_the_pictures_are_those_in_the_folder_and_small():
    names = set(re.findall(r"\]\((\.github/[^)]+)\)", README))
    pictures = [path for path in (ROOT / ".github").iterdir() if path.suffix in (".png", ".gif")]
    assert {f".github/{path.name}" for path in pictures} == names
    assert sum(path.stat().st_size for path in pictures) < 500_000


def test_options_are_those_of_the_parser_with_the_signatures_defaults():
    table = README.split("## Options")[1].split("##")[0]
    text = cvae_mnist.make_parser().format_help()
    options = set(re.findall(r"--[a-z-]+", text)) - {"--help"}
    assert set(re.findall(r"`(--[a-z-]+)`", table)) == options
    parameters = {
        **inspect.signature(cvae_mnist.inference_cvae).parameters,
        **inspect.signature(cvae_mnist.train_cvae).parameters,
    }
    sizes, folders = ["h_dim", "z_dim"], ["data_dir", "out_dir"]
    numbers = ["epochs", "batch_size", "learning_rate", "num_classes", "seed", "temperature"]
    for name in numbers:
        assert f"| `--{name.replace('_', '-')}` | {parameters[name].default} |" in table
    for name in numbers + sizes + folders:
        assert f"[{parameters[name].default}" in text
    assert f"| {parameters['h_dim'].default}, {parameters['z_dim'].default} |" in table


def test_the_scripts_header_asks_for_what_requirements_ask_for():
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert f"# dependencies = {requirements}".replace("'", '"') in SOURCE
    assert '# requires-python = ">=3.10"' in SOURCE and "Python 3.10 or newer" in README
