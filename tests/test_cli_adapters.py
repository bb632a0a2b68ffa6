"""`molora convert --adapters` and `molora export` through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_adapters import edit_config
from lora_pools import logits_of, same_tensors, tensors_of
from peft import LoraConfig, PeftModel, get_peft_model
from test_cli import molora
from tiny_lm import save_tiny, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from molora import from_adapters

IDS = torch.tensor([[5, 9, 3, 20, 31, 7]])
TEXTS = {"sql": ["select a from b", "select c"], "math": ["1 + 1 = 2", "7 times 6"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the base, two adapters and their example prompts."""
    path = tmp_path_factory.mktemp("home")
    save_tiny(path / "base")
    for i, name in enumerate(TEXTS):
        torch.manual_seed(i)
        config = LoraConfig(
            r=2,
            lora_alpha=3 + i,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        get_peft_model(tiny_llama(), config).save_pretrained(path / name)
        (path / f"{name}.txt").write_text("\n".join(["", *TEXTS[name], " "]), encoding="utf-8")
    (path / "empty.txt").write_text(" \n", encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def adapters(home: Path) -> dict[str, Path]:
    return {name: home / name for name in TEXTS}


def load(path: Path | str) -> PeftModel:
    return PeftModel.from_pretrained(tiny_llama(), path).eval()


def convert(out: Path, *more: str, settings: tuple[str, ...] = ()) -> int:
    return molora("convert", "base", str(out), *settings, "--adapters", "sql=sql", "math=math", *more)


@pytest.mark.parametrize("router", ["arrow", "centroid", "retrieval"])
def test_adapters_become_a_mixture(router: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = [] if router == "arrow" else ["--examples", "sql=sql.txt", "math=math.txt"]
    assert convert(tmp_path / "out", "--router", router, *examples) == 0
    output = capsys.readouterr()
    assert "experts" in output.out and "warning" not in output.err.lower()
    model = load(tmp_path / "out")
    want = from_adapters(tiny_llama(), adapters(home), router).eval()
    if router != "arrow":
        want.set_centroids(TEXTS, tiny_tokenizer())
    assert same_tensors(tensors_of(model), tensors_of(want))
    with model.prompts(IDS[:, :3]), want.prompts(IDS[:, :3]):
        assert torch.equal(logits_of(model, IDS), logits_of(want, IDS))
    assert molora("generate", str(tmp_path / "out"), "select", "--max-new-tokens", "3") == 0
    assert convert(tmp_path / "out", "--router", router, *examples) == 2
    assert convert(tmp_path / "out", "--router", router, *examples, "--overwrite") == 0


def test_settings_and_a_preset_go_with_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(tmp_path / "a", settings=("router.top_k=1", "placement=block")) == 0
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["router"] == {"name": "arrow", "top_k": 1, "router_temperature": 1.0}
    assert config["placement"] == "block" and config["expert_names"] == ["sql", "math"] and config["r"] == 2
    capsys.readouterr()
    assert convert(tmp_path / "b", "--preset", "meteora", settings=("router.top_k=1",)) == 0
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["router"]["name"], config["router"]["top_k"], config["router"]["task_loss_coef"]) == ("top_k", 1, 50)
    assert "the gates of router top_k are not trained yet; train them by a recipe" in capsys.readouterr().err
    assert convert(tmp_path / "c", "--router", "retrieval") == 0
    assert "a retrieval router needs example prompts before it routes: give --examples" in capsys.readouterr().err
    assert convert(tmp_path / "d", "--general", "sql", "math") == 0
    general = from_adapters(tiny_llama(), {n: n for n in TEXTS}, general=["sql", "math"])
    assert same_tensors(tensors_of(load(tmp_path / "d")), tensors_of(general))


def test_a_partial_adapter_wants_a_word(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial = tmp_path / "partial"
    partial.mkdir()
    for file in (home / "sql").iterdir():
        (partial / file.name).write_bytes(file.read_bytes())
    edit_config(partial, target_modules=["q_proj", "down_proj", "v_proj"])
    arguments = ("convert", "base", str(tmp_path / "out"), "--adapters", f"a={partial}", "--router", "arrow")
    assert molora(*arguments) == 2
    assert "2 of them have no weights" in (error := capsys.readouterr().err) and "--allow-partial" in error
    assert not (tmp_path / "out").exists()
    assert molora(*arguments, "--allow-partial") == 0
    assert "has no weights for 2 of the 6 linears" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--adapters", "sql"], "--adapters: 'sql' must be NAME=PATH|--adapters: 'sql' must be NAME=VALUE"),
        (["--adapters", "sql="], "--adapters: 'sql=' must be NAME=VALUE"),
        (["--adapters", "sql=sql", "sql=math"], "--adapters: 'sql' is given twice; each needs a name of its own"),
        (["--adapters", "sql=./none"], "expert 'sql': adapter ./none: no such directory"),
        (["--adapters", "a/b=sql"], "expert name 'a/b' must be a word without slashes"),
        (["--adapters", "sql=sql", "--router", "arow"], "did you mean 'arrow'"),
        (["--adapters", "sql=sql", "--preset", "meteor"], "did you mean 'meteora'"),
        (["router.topk=1", "--adapters", "sql=sql"], "did you mean 'top_k'"),
        (["r=4", "--adapters", "sql=sql"], "r follows from the adapters; leave it out"),
        (["placement=ffn", "--adapters", "sql=sql"], "placement='ffn': LoRAs of linears become experts of linears"),
        (["--adapters", "sql=sql", "router.top_k=1"], "router.top_k=1 is a setting, no adapter; put settings before"),
        (["--router", "arrow"], "go with --adapters; name the adapters"),
        (["--allow-partial"], "go with --adapters; name the adapters"),
        (["--general", "sql"], "go with --adapters; name the adapters"),
        (["--examples", "sql=sql.txt"], "go with --adapters; name the adapters"),
        (["--adapters", "sql=sql", "--router", "centroid", "--examples", "sql=none.txt"], "--examples: no file"),
        (["--adapters", "sql=sql", "--router", "retrieval", "--examples", "sql=empty.txt"], "empty.txt has no prompts"),
        (["--adapters", "sql=sql", "--router", "retrieval", "--examples", "math=math.txt"], "examples are for"),
        (["--adapters", "sql=sql", "--examples", "sql=sql.txt"], "router 'arrow' has no centroids"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_of_convert(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert molora("convert", "base", str(tmp_path / "out"), *more) == 2
    error = capsys.readouterr().err
    assert any(part in error for part in message.split("|")) and error.count("error:") == 1
    assert "Traceback" not in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--router", "retrieval"], "router 'retrieval' knows experts by example prompts; give --examples NAME=FILE"),
        (["--router", "centroid"], "router 'centroid' knows experts by example prompts; give --examples NAME=FILE"),
        (["--router", "retrival"], "did you mean 'retrieval'"),
        (["--router", "top_k"], "router 'top_k' must be trained for its experts first"),
        (["--router", "phatgoose"], "router 'phatgoose' must be trained for its experts first"),
        (["--router", "retrieval", "--examples", "sql=sql.txt"], "examples has 1 sets of prompts (sql)"),
    ],
)
def test_bad_input_of_serve(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert molora("serve", "base", "--adapters", "sql=sql", "math=math", *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1 and "Traceback" not in error


# -- export ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtures(home: Path) -> Path:
    """Saved mixtures of both adapters, "two", and of one, "one", and a LoRA that names its base."""
    for out, names in (("two", list(TEXTS)), ("one", ["sql"])):
        base = AutoModelForCausalLM.from_pretrained(home / "base")
        from_adapters(base, {n: home / n for n in names}).save_pretrained(home / out)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(home / "base"), lora).save_pretrained(home / "lora")
    return home


def test_export_as_loras(mixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--overwrite"]):
        assert molora("export", "two", str(tmp_path / "out"), "--to", "loras", *more) == 0
        assert f"2 adapters in {tmp_path / 'out'}: sql, math" in capsys.readouterr().out.replace("\n", "")
        for name in TEXTS:
            got, want = (logits_of(load(path), IDS) for path in (tmp_path / "out" / name, mixtures / name))
            assert (got - want).abs().max() < 1e-6
        config = json.loads((tmp_path / "out" / "sql" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(mixtures / "base")
    assert molora("export", "two", str(tmp_path / "out"), "--to", "loras") == 2
    assert "pass --overwrite" in capsys.readouterr().err


def test_export_as_one_model(mixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert molora("export", "one", str(tmp_path / "merged"), "--to", "merged") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits_of(merged, IDS) - logits_of(load(mixtures / "sql"), IDS)).abs().max() < 1e-5
    assert molora("generate", str(tmp_path / "merged"), "select", "--max-new-tokens", "2") == 0
    assert molora("export", "two", str(tmp_path / "no"), "--to", "merged") == 2
    assert "2 gates that differ from token to token" in (error := capsys.readouterr().err) and "--to loras" in error
    assert not (tmp_path / "no").exists() or not any((tmp_path / "no").iterdir())


@pytest.mark.parametrize(
    ("more", "numbers"),
    [
        ([], [0.5, 0.5]),
        (["--combination", "cat", "--weights", "sql=1", "math=0.25"], [1.0, 0.25]),
        (["--combination", "ties", "--density", "0.5"], [1.0, 1.0]),
    ],
)
def test_export_as_an_average(more: list[str], numbers: list[float], mixtures: Path, tmp_path: Path) -> None:
    assert molora("export", "two", str(tmp_path / "out"), "--to", "average", *more) == 0
    # The scalings are in B of what is exported, and PEFT's average of matrices is of these.
    assert molora("export", "two", str(tmp_path / "loras"), "--to", "loras") == 0
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "loras" / "sql", adapter_name="one")
    theirs.load_adapter(tmp_path / "loras" / "math", adapter_name="two")
    density: dict[str, Any] = {"density": 0.5} if "--density" in more else {}
    theirs.add_weighted_adapter(
        ["one", "two"], numbers, "all", combination_type=more[1] if more else "linear", **density
    )
    theirs.set_adapter("all")
    want = logits_of(theirs.eval(), IDS)
    assert (logits_of(load(tmp_path / "out"), IDS) - want).abs().max() < 1e-5
    assert (want - logits_of(tiny_llama(), IDS)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["two", "{out}", "--to", "lora"], "--to='lora'"),
        (["two", "{out}", "--to", "loras", "--weights", "sql=1"], "--combination and --weights go with --to average"),
        (["two", "{out}", "--to", "merged", "--combination", "ties"], "go with --to average"),
        (["two", "{out}", "--to", "average", "--weights", "sql=x"], "--weights: sql='x' must be a number"),
        (["two", "{out}", "--to", "average", "--weights", "sql=nan"], "--weights: sql=nan"),
        (["two", "{out}", "--to", "average", "--weights", "sql=1"], "weights are for sql, the adapters are sql, math"),
        (["two", "{out}", "--to", "average", "--combination", "mean"], "combination='mean'"),
        (["two", "{out}", "--to", "average", "--density", "0"], "density=0"),
        (["lora", "{out}", "--to", "loras"], "lora is no mixture, so it has no experts"),
        (["base", "{out}", "--to", "loras"], "base is no mixture, so it has no experts"),
        (["none", "{out}", "--to", "loras"], "no such directory 'none'"),
        (["two", "base", "--to", "loras"], "base exists and is not empty; pass --overwrite"),
        (["two", "sql.txt", "--to", "loras"], "sql.txt is a file; choose a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_of_export(
    arguments: list[str], message: str, mixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert molora("export", *(a.format(out=tmp_path / "out") for a in arguments)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error and error.count("error:") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_help_names_the_new_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert molora("convert", "--help") == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--adapters", "--router", "--examples", "--general", "--allow-partial"))
    assert molora("export", "--help") == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("loras", "merged", "average", "--combination", "--weights"))


def test_a_system_names_its_router(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--router meteora`` is the router of that preset, whose gates a recipe then trains."""
    assert convert(tmp_path / "out", "--router", "meteora") == 0
    assert "not trained yet" in capsys.readouterr().err.replace("\n", " ")
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["router"]["name"] == "top_k" and saved["router"]["task_loss_coef"] == 50.0
    assert saved["expert_names"] == ["sql", "math"] and saved["freeze_experts"] is True
