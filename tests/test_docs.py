"""Every block of the documentation runs, Python and commands alike; every link leads to where it says.

The blocks of a page run in their order in one empty directory that has the repository's `recipes` and `benchmarks`; its
Python blocks share one namespace, which begins as ASSUMED leaves it. Nothing on a page is left out in silence: a
command is run, or shortened by SHORTER, or stands in NOT_RUN with its reason and a check; an entry that no page needs
any more is an error.
"""

from __future__ import annotations

import inspect
import os
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main
import yaml
from test_cli import molora

import molora as package
import molora_cli
from molora.model import MoloraModel
from molora.routers import ROUTERS
from molora.train import quickstart

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("MOLORA_DATA", ROOT.parent / "shared" / "data")).resolve()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("molora", "python", "pip", "make", "git", "cd", "bash", "pytest", "torchrun", "accelerate", "export")
COMMANDS = typer.main.get_command(molora_cli.app).commands

# What a page may use without saying where it comes from.
ASSUMED = """
from transformers import AutoModelForCausalLM, AutoTokenizer
from molora import MoloraConfig
from molora.assets import MOLORA_TINY

base = AutoModelForCausalLM.from_pretrained(MOLORA_TINY)
tokenizer = AutoTokenizer.from_pretrained(MOLORA_TINY)
"""


class Block(NamedTuple):
    """A fenced block, or an indented one (language ""), from a line of its page."""

    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    fence: str | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            fence = None if fence is not None else line[3:].strip()
            if fence is not None:
                found.append(Block(number, fence or "text", ""))
        elif fence is not None:
            found[-1] = found[-1]._replace(text=found[-1].text + line + "\n")
        elif line.startswith("    "):
            found.append(Block(number - 1, "", line[4:] + "\n"))
    return found


def commands(block: Block) -> Iterator[str]:
    """The commands of a block without comments; an indented line is one if its first word is a program."""
    if block.language not in ("bash", ""):
        return
    for line in block.text.replace("\\\n", " ").splitlines():
        words = [word for word in line.split() if "=" not in word]  # VARIABLE=value may stand in front
        if block.language == "bash" or words[:1] and words[0] in PROGRAMS:
            yield from filter(None, shlex.join(shlex.split(line, comments=True)).split(" '&&' "))


# -- commands that a test runs shorter ---------------------------------------------------------------------------------


def short_run(arguments: list[str]) -> list[str]:
    """Two steps, few rows, four tokens for each answer."""
    recipe = yaml.safe_load(Path(arguments[1]).read_text(encoding="utf-8"))
    extra = ["training.max_steps=2", "training.save_steps=1", "training.warmup_steps=0"]
    for index, task in enumerate(recipe["tasks"]):
        extra.append(f"tasks.{index}.limit=48")
        if "eval" in task:
            extra += [f"tasks.{index}.eval.limit=2", f"tasks.{index}.eval.max_new_tokens=4"]
    return extra


SHORTER: dict[str, Callable[[list[str]], list[str]]] = {
    r"molora train ": short_run,
    r"molora generate ": lambda arguments: ["--max-new-tokens", "4"],
    r"molora bench \w": lambda arguments: ["--tiny", "--repeats", "1"],
}
QUICKSTART = {"STEPS": 2, "TRAIN_ROWS": 60, "TEST_ROWS": 2, "CHAIN_ROWS": 1}
QUICKSTART |= {"SKILLS": quickstart.SKILLS[:2], "CHAINS": quickstart.CHAINS[:1]}

# -- commands that a test cannot run -----------------------------------------------------------------------------------


def is_target(command: str) -> None:
    targets = re.findall(r"^([\w ]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert command.split()[1] in " ".join(targets).split(), f"the Makefile has no such target: {command}"


def is_extra(command: str) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extra in re.findall(r"\[([\w,]+)\]", command):
        assert set(extra.split(",")) <= known.keys(), f"pyproject.toml has no such extra: {command}"


def is_script(command: str) -> None:
    """The script is there, and every option is one of its own or of a script beside it that it imports."""
    script = next(word for word in command.split() if word.endswith(".py"))
    source = (ROOT / script).read_text(encoding="utf-8")
    for name in re.findall(r"^from (\w+) import", source, flags=re.MULTILINE):
        beside = (ROOT / script).with_name(f"{name}.py")
        source += beside.read_text(encoding="utf-8") if beside.is_file() else ""
    for option in re.findall(r"(--[\w-]+)", command):
        assert f'"{option}"' in source, f"{script} has no option {option}"


def is_launch(command: str) -> None:
    """What the launcher starts is a command of ours with options of its own."""
    words = command.replace("-m molora_cli", "molora").partition("molora ")[2].split()
    options = {option for parameter in COMMANDS[words[0]].params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options, command
    assert (ROOT / words[1]).is_file(), command


def is_serve(command: str) -> None:
    """Its options are there."""
    options = {option for parameter in COMMANDS["serve"].params for option in parameter.opts}
    assert {word for word in command.split() if word.startswith("--")} <= options, command


NOT_RUN: dict[str, tuple[str, Callable[[str], None]]] = {
    r"git clone ": ("needs the network", lambda command: None),
    r"cd molora$": ("the clone is not there", lambda command: None),
    r"pip install ": ("changes the environment", is_extra),
    r"(torchrun|deepspeed|accelerate launch) ": ("starts several processes, as tests/distributed does", is_launch),
    r"make ": ("makes an environment first", is_target),
    r"molora serve ": ("serves until it is stopped", is_serve),
    r"python (benchmarks|recipes)/": ("takes minutes, or wants data that the repository does not have", is_script),
}
# Recipes on the data folder, which is not part of the repository; the runs they make bear their names.
NEEDS_DATA = [path.stem for path in (ROOT / "recipes").glob("*.yaml") if "MOLORA_DATA" in path.read_text("utf-8")]


def run_commands(block: Block, page: str) -> list[str]:
    """Runs the commands of a block; returns those that had to be left out for want of data."""
    left_out = []
    for command in commands(block):
        checks = [check for pattern, (_, check) in NOT_RUN.items() if re.match(pattern, command)]
        if checks:
            checks[0](command)
        elif any(name in command for name in NEEDS_DATA) and not (DATA / "models").is_dir():
            left_out.append(command)
        else:
            program, *arguments = shlex.split(command)
            assert program == "molora", f"{page}:{block.line}: cannot run {command!r}; run it here, or say in NOT_RUN"
            for pattern, more in SHORTER.items():
                arguments += more(arguments) if re.match(pattern, command) else []
            code = molora(*arguments)
            assert code == 0, f"{page}:{block.line}: {command!r} ends with exit code {code}"
    return left_out


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("recipes", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOLORA_DATA", str(DATA))
    for name, value in QUICKSTART.items():
        monkeypatch.setattr(quickstart, name, value)
    namespace: dict[str, Any] = {}
    left_out = []
    for block in blocks(page):
        if block.language == "python":
            if not namespace:
                exec(ASSUMED, namespace)
            exec(compile("\n" * block.line + block.text, page, "exec"), namespace)
        elif block.language in ("bash", ""):
            left_out += run_commands(block, page.name)
        else:
            assert block.language in ("text", "yaml"), f"{page.name}:{block.line}: nothing runs {block.language!r}"
    if left_out:
        pytest.skip(f"no data folder {DATA}, set MOLORA_DATA; not run: {'; '.join(left_out)}")


def test_no_table_has_a_dead_entry() -> None:
    said = [command for page in PAGES for block in blocks(page) for command in commands(block)]
    for pattern in (*NOT_RUN, *SHORTER, "molora quickstart"):
        assert any(re.match(pattern, command) for command in said), f"no page has a command like {pattern!r}"


def test_commands_inside_sentences_exist() -> None:
    """What running text and tables name in code marks: commands with their options, targets, scripts, test files."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for code in re.findall(r"`((?:molora|make|python) [^`]+)`", text):
            program, name = code.split()[:2]
            if program == "make":
                is_target(code)
            elif program == "python":
                is_script(code)
            elif program == "molora" and name not in ("COMMAND", "--debug"):
                assert name in COMMANDS, f"{page.name}: no command {code!r}"
                options = {option for parameter in COMMANDS[name].params for option in parameter.opts} | {"--help"}
                unknown = set(re.findall(r"--[\w-]+", code)) - options
                assert not unknown, f"{page.name}: {code!r} has unknown options {unknown}"
        for file in re.findall(r"`((?:tests|benchmarks|recipes|molora|docs)/[\w./*]+)`", text):
            assert list(ROOT.glob(file)), f"{page.name} names {file}, which is not there"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"\w+:", target):
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.exists(), f"{page.name} links to {target}, which is not there"
            assert not anchor or anchor in anchors(file), f"{page.name} links to {target}; there is no such heading"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert not [page.name for page in PAGES if page.name != "index.md" and f"{page.name})" not in index]


def test_the_command_line_page_has_every_option() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `molora {name} "))
        for parameter in command.params:
            option = parameter.opts[0]
            assert not option.startswith("--") or option in row, f"docs/cli.md: molora {name} has {option}"


def signature(name: str, what: Any) -> str:
    """A call as the page writes it: names and defaults, no types."""
    known = [p for p in inspect.signature(what).parameters.values() if p.name != "self"]
    return f"{name}({', '.join(str(p.replace(annotation=p.empty)) for p in known)})"


def test_the_python_page_has_every_public_name_as_it_is() -> None:
    text = (ROOT / "docs" / "python_api.md").read_text(encoding="utf-8")
    for name in package.__all__:
        what = getattr(package, name)
        wanted = f"`molora.{name}`" if inspect.isclass(what) else f"`molora.{signature(name, what)}`"
        assert wanted in text, wanted
    for name in ("aux_weight", "set_centroids", "set_kernel", "generate"):
        assert f"`model.{signature(name, getattr(MoloraModel, name))}`" in text
    for config in ROUTERS.values():
        assert f"| `{config.__name__}` | `{config.name}` |" in text
        for field in fields(config):
            assert f"{field.name}={field.default!r}" in text, f"{config.__name__}.{field.name}"
