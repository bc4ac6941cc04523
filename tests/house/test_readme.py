"""What the README tells a reader to type exists: modules answer --help, sessions and files are there."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(?:console|bash|sh)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    part.split("#")[0].strip()
    for block in BLOCKS
    for line in block.splitlines()
    for part in line.removeprefix("$ ").split("&&")
]
MODULES = sorted(
    {
        match[1]
        for command in COMMANDS
        if (match := re.search(r"(?:python3?|torchrun .*?) -m (\S+)", command))
        and match[1] not in ("pip", "venv", "nox")
    }
)
LINKS = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]


def sessions() -> set[str]:
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    decorated = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    return {node.name for node in decorated}


def test_the_first_screen_gives_the_two_commands() -> None:
    first = README.splitlines()[:40]
    assert any("python -m pip install nox && nox -s bench" in line for line in first)
    assert any("nox -s tests" in line for line in first)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_the_readme_answers_help(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_the_sessions_of_the_readme_are_in_the_noxfile() -> None:
    named = {word for command in COMMANDS if "nox -s" in command for word in _sessions_of(command)}
    assert named, "the README names its sessions"
    assert named <= sessions()


def _sessions_of(command: str) -> list[str]:
    words = shlex.split(command)
    after = words[words.index("-s") + 1 :]
    return after[: after.index("--")] if "--" in after else after


@pytest.mark.parametrize("link", LINKS)
def test_a_file_of_the_readme_is_there(link: str) -> None:
    assert (ROOT / link).exists()
