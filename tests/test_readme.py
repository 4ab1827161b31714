"""README.md and the other pages: their scripts accept every command in them.

    the commands     test_every_command_is_understood, test_torchrun_can_share_the_batch
    links            test_every_link_leads_to_a_file_or_a_heading
    CI               test_ci_runs_the_test_command
    use from Python  test_the_example_in_python_runs
    length           test_readme_is_a_landing_page
"""
import argparse
import re
import runpy
import shlex
import sys

import pytest

import data
import train_transformer
import train_vae
from conftest import ROOT

PAGES = [ROOT / name for name in ("README.md", "tests/tools/RESULTS.md", "tests/tools/MANUAL.md",
                               "tests/course/README.md", "assets/README.md")]
COMMAND = re.compile(r"\s*((?:\w+/)*\w+\.py)((?:\s.*)?)$")


def commands():
    """-> {line: (script, its arguments, number of processes)} for code blocks and inline code that name a script"""
    found = {}
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        code = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        code += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in (part.strip() for line in code for part in line.split("#")[0].split("&&")):
            match = COMMAND.match(re.sub(r"^torchrun( --\S+)*|^\S*python", "", line))
            if match and (ROOT / match[1]).exists() and (match[2] or line.startswith(("python", "torchrun"))):
                processes = re.search(r"--nproc_per_node=(\d+)", line)
                found[line] = (match[1], shlex.split(match[2]), int(processes[1]) if processes else 1)
    return found


COMMANDS = commands()


class Understood(Exception):
    pass


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line, monkeypatch, tmp_path):
    """Run the script up to its parser, which raises SystemExit for unknown flags and for values out of range."""
    name, words, _ = COMMANDS[line]
    words = [re.sub(r"^(NAME|S|N)$", "0", word) for word in words if word not in ("[CHECKPOINT]", "...")]
    real = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        real(self, *args, **kwargs)
        raise Understood
    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(data, "find_images", lambda root, skip: data.Found(root, [], None))  # they are not here
    with pytest.raises(Understood):
        runpy.run_path(str(ROOT / name), run_name="__main__")


@pytest.mark.parametrize("line", [line for line in COMMANDS if COMMANDS[line][2] > 1])
def test_torchrun_can_share_the_batch(line, monkeypatch, tmp_path):
    name, words, processes = COMMANDS[line]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *words])
    schedule = dict(zip(("train_vae.py", "train_transformer.py"), (train_vae, train_transformer)))[name].parse()[2]
    assert schedule.batch_size % (schedule.accumulate * processes) == 0


def heading(title):
    """The anchor that GitHub derives from a heading."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_link_leads_to_a_file_or_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in {heading(title) for title in re.findall(r"^#+ (.*)$", file.read_text(), re.M)}, target


def test_ci_runs_the_test_command():
    """The workflow installs what README's test command installs, and runs the tests in the same way."""
    workflow, readme = (ROOT / ".github/workflows/tests.yml").read_text(), PAGES[0].read_text()
    install, run = re.search(r"pip install ([^&\n]* pytest) && \S*python (-m pytest[^\n]*)", readme).groups()
    assert f"pip install {install} " in workflow and f"python {run}\n" in workflow


def test_the_example_in_python_runs(monkeypatch):
    """From a checkpoint to images, and from an image to its likelihood. Only one sample is drawn, to save time."""
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(ROOT)
    names = {}
    exec(example.replace("(4,)", "(1,)"), names)
    assert names["images"].shape == (1, 3, 64, 64) and names["images"].isfinite().all()
    assert 500 < names["nats"].item() < 6000 and (names["grains"] >= 0).all()


def test_readme_is_a_landing_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1500
    assert all(len(line) <= 250 for line in text.splitlines() if not line.startswith("|"))
