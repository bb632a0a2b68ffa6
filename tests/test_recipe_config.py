"""The recipe: every key and every type is checked at any depth, and the resolved recipe reads back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from molora.eval.strict import apply_overrides, build, expand_variables, parse_yaml, read_yaml
from molora.eval.suite import read_suite
from molora.train.recipe import Recipe, read_recipe, recipe_yaml

MINIMAL: dict[str, Any] = {
    "schema": "molora.recipe/1",
    "base": {"model": "some/base"},
    "mixture": {"num_experts": 4, "r": 8},
    "tasks": [
        {"name": "sums", "data": "sums.jsonl", "prompt": "{q}", "answer": "{a}", "eval": {"limit": 3}},
        {"name": "chat", "data": "some/chat", "messages": "messages"},
    ],
    "training": {"output_dir": "runs/x"},
}


def build_recipe(**changes: Any) -> Recipe:
    data = copy.deepcopy(MINIMAL)
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = data
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[last] = value
    return build(Recipe, data, "recipe")


def test_a_minimal_recipe_is_accepted() -> None:
    recipe = build_recipe()
    assert recipe.tasks[0].metric == "exact_match"
    assert recipe.mixing.strategy == "proportional"


@pytest.mark.parametrize(
    ("path", "where", "nearest"),
    [
        ("trainig", "recipe", "training"),
        ("base__modle", "recipe.base", "model"),
        ("tasks__0__promt", r"recipe.tasks\[0\]", "prompt"),
        ("tasks__0__eval__limits", r"recipe.tasks\[0\].eval", "limit"),
        ("mixing__temprature", "recipe.mixing", "temperature"),
        ("mixing__streming", "recipe.mixing", "streaming"),
        ("tasks__1__sise", r"recipe.tasks\[1\]", "size"),
        ("sequence__maxlength", "recipe.sequence", "max_length"),
        ("training__learning_rat", "recipe.training", "learning_rate"),
        ("evaluation__befor", "recipe.evaluation", "before"),
        ("mixture__num_expert", "MoloraConfig", "num_experts"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(path: str, where: str, nearest: str) -> None:
    key = path.split("__")[-1]
    with pytest.raises(ValueError, match=f"unknown key '{key}' in {where}: did you mean '{nearest}'"):
        build_recipe(**{path: 1})


def test_an_unknown_router_key_is_named() -> None:
    with pytest.raises(ValueError, match="top_k"):
        build_recipe(mixture__router={"name": "top_k", "topk": 2})


def test_an_unknown_lora_key_is_named() -> None:
    data = {key: value for key, value in MINIMAL.items() if key != "mixture"} | {"lora": {"lora_alfa": 3}}
    with pytest.raises(ValueError, match="unknown key 'lora_alfa' in recipe.lora: did you mean 'lora_alpha'"):
        build(Recipe, data, "recipe")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", "abc", "recipe.lora.r must be of type int, got 'abc'"),
        ("lora_alpha", "x", "recipe.lora.lora_alpha must be of type float, got 'x'"),
        ("lora_dropout", "x", "recipe.lora.lora_dropout must be of type float, got 'x'"),
        ("target_modules", 5, "recipe.lora.target_modules must be of type list or str, got 5"),
    ],
)
def test_a_lora_value_of_another_type_is_named(key: str, value: Any, message: str) -> None:
    data = {name: section for name, section in MINIMAL.items() if name != "mixture"} | {"lora": {key: value}}
    with pytest.raises(ValueError, match=message):
        build(Recipe, data, "recipe")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", "molora.recipe/2", "recipe.schema must be one of 'molora.recipe/1'"),
        ("tasks", [], "tasks is empty"),
        ("tasks__0__name", "chat", "two tasks have the same name"),
        ("tasks__0__limit", "many", r"recipe.tasks\[0\].limit must be of type int, got 'many'"),
        ("tasks__0__limit", 0, "task 'sums': limit=0 must be above 0"),
        ("tasks__0__weight", 0, "task 'sums': weight=0.0 must be above 0"),
        ("tasks__0__messages", "m", "either prompt and answer, or messages"),
        ("tasks__0__answer", None, "prompt and answer belong together"),
        ("tasks__0__loss", "assistant", "loss='assistant' does not fit"),
        ("tasks__0__choices", ["one"], "at least two"),
        ("tasks__0__choices", [True, False], r"must be of type str, got True; put quotes"),
        ("tasks__0__eval__metric", "choice", "metric 'choice' needs choices"),
        ("tasks__0__eval__metric", "f1", "must be one of 'exact_match', 'number', 'rouge_l', 'choice', got 'f1'"),
        ("mixture__preset", "mixlra", "did you mean 'mixlora'"),
        ("lora", {"r": 4}, "exactly one of the sections mixture and lora"),
        ("mixing__strategy", "temperature", "temperature=None"),
        (
            "tasks__1__messages",
            [{"role": "bot", "content": "x"}],
            "task 'chat': messages has the role 'bot'; the roles",
        ),
        (
            "tasks__1__messages",
            [{"role": "user", "content": 5}],
            r"messages\[0\].content must be of type str, got 5",
        ),
        (
            "mixing__streaming",
            True,
            "mixing.streaming needs recipe.training.max_steps, because a stream has no end",
        ),
        ("mixing__buffer_size", 8, "mixing: buffer_size is for streaming; remove it, or set mixing.streaming: true"),
        ("tasks__1__size", 10, "task 'chat': size=10 is for mixing.streaming; remove it, the rows are counted"),
        ("mixing__temperature", 2.0, "'proportional' with temperature=2.0"),
        ("sequence__max_length", 1, "at least 2"),
        ("training", {}, "lacks the key output_dir"),
        ("training__eval_strategy", "steps", "use the evaluation section"),
        ("training__resume_from_checkpoint", "x", "use --resume"),
        ("training__max_steps", "abc", "recipe.training.max_steps must be of type int, got 'abc'"),
        ("training__max_steps", "=4", "got '=4'; write one = between key and value"),
        ("training__max_steps", 0, "max_steps=0 must be at least 1, or -1 to count epochs"),
        ("training__max_steps", True, "max_steps must be of type int, got True"),
        ("training__learning_rate", "abc", "recipe.training.learning_rate must be of type float, got 'abc'"),
        ("training__save_steps", 0, "save_steps=0 must be above 0"),
        ("training__per_device_train_batch_size", 0, "per_device_train_batch_size=0 must be at least 1"),
        ("training__bf16", "maybe", "recipe.training.bf16 must be of type bool, got 'maybe'"),
        ("training__output_dir", 5, "recipe.training.output_dir must be of type str, got 5"),
        ("training__output_dir", None, "recipe.training.output_dir must be of type str, got None"),
        ("training__output_dir", "", "recipe.training.output_dir is empty"),
        ("training__zzz", 1, "'zzz' in recipe.training; the keys are those of transformers.TrainingArguments$"),
        ("mixing__seed", -1, "mixing: seed=-1 must be at least 0"),
        ("tasks__0__parse", "(", "task 'sums': parse='.' is not a regular expression: missing"),
        ("evaluation__batch_size", 0, "evaluation.batch_size=0 must be at least 1"),
        ("tasks__0__eval__limit", 0, "task 'sums': eval.limit=0 must be at least 1"),
        ("tasks__0__eval__max_new_tokens", 0, "task 'sums': eval.max_new_tokens=0 must be at least 1"),
        ("tasks__0__answer", "{", "task 'sums': answer='{' is not a template .*; write {{ and }} for braces"),
        ("tasks__0__choices", ["a", "}"], "task 'sums': choices.'}'.='}' is not a template"),
        ("base", "some/base", "recipe.base must be a mapping"),
        ("base__dtype", "float8", "must be one of 'auto', 'float32'"),
    ],
)
def test_a_bad_value_gets_one_clear_sentence(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_recipe(**{path: value})


def test_values_that_only_transformers_can_judge_are_refused_with_the_section() -> None:
    from molora.train.prepare import training_arguments

    assert training_arguments(build_recipe(training__max_steps=3, training__optim="sgd")).max_steps == 3
    with pytest.raises(ValueError, match="recipe.training: nope is not a valid SchedulerType"):
        training_arguments(build_recipe(training__lr_scheduler_type="nope"))


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match="recipe.base lacks the key model"):
        build_recipe(base={})


def test_numbers_and_words_are_read_as_yaml_1_2() -> None:
    assert parse_yaml("{a: 2e-4, b: 5.0e-3, c: yes, d: no, e: true, f: 1, g: .5, h: 1.}") == {
        "a": 2e-4,
        "b": 5e-3,
        "c": "yes",
        "d": "no",
        "e": True,
        "f": 1,
        "g": 0.5,
        "h": 1.0,
    }


def test_overrides_reach_any_depth_and_are_checked_alike(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    overrides = ["training.learning_rate=1e-3", "tasks.sums.limit=7", "tasks.1.weight=2", "mixing={strategy: weights}"]
    recipe = read_recipe(path, overrides)
    assert recipe.training["learning_rate"] == 1e-3
    assert (recipe.tasks[0].limit, recipe.tasks[1].weight, recipe.mixing.strategy) == (7, 2.0, "weights")
    with pytest.raises(ValueError, match="unknown key 'limt' in recipe.tasks.0.: did you mean 'limit'"):
        read_recipe(path, ["tasks.sums.limt=7"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training", "must read key.sub=value"),
        ("tasks.summs.limit=3", r"no item 'summs' in a list of 1; use an index or one of the names \['sums'\]"),
        ("tasks.sums.prompt=Q: {q} A:", "the value is not valid YAML; put it in quotes"),
        ("schema.x=1", "'schema' holds 'a', which has no keys"),
    ],
)
def test_a_bad_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_overrides({"schema": "a", "tasks": [{"name": "sums"}]}, [override])


def test_variables_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLORA_TEST_DIR", "/there")
    monkeypatch.delenv("MOLORA_TEST_UNSET", raising=False)
    assert expand_variables({"a": ["${MOLORA_TEST_DIR}/x"]}, "r") == {"a": ["/there/x"]}
    assert expand_variables("${MOLORA_TEST_UNSET:-here}/x", "r") == "here/x"
    with pytest.raises(ValueError, match=r"r: a names \$\{MOLORA_TEST_UNSET\}, which is not set; export"):
        expand_variables({"a": "${MOLORA_TEST_UNSET}"}, "r")


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file .*nothing.yaml"):
        read_yaml(tmp_path / "nothing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(ValueError, match=r"latin.yaml is not UTF-8 text: .*0xe9"):
        read_yaml(tmp_path / "latin.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="must hold a mapping of sections, got list"):
        read_yaml(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    with pytest.raises(ValueError, match="is not valid YAML"):
        read_yaml(tmp_path / "broken.yaml")


def test_the_resolved_recipe_reads_back(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}"}]
    changes = {"tasks__0__choices": {"1": "yes", "0": "no"}, "tasks__1__messages": turns, "tasks__1__size": 5}
    streamed = {"mixing__streaming": True, "training__max_steps": 3}
    recipe = build_recipe(training__learning_rate=2e-4, **changes, **streamed)
    (tmp_path / "resolved.yaml").write_text(recipe_yaml(recipe))
    assert read_recipe(tmp_path / "resolved.yaml") == recipe


@pytest.mark.parametrize("name", ["instruct.yaml", "instruct_local.yaml"])
def test_the_recipes_for_instructions_read(name: str) -> None:
    recipe = read_recipe(Path(__file__).parents[1] / "recipes" / name)
    assert (recipe.mixing.streaming, recipe.mixing.strategy, recipe.mixture["num_experts"]) == (True, "temperature", 8)
    assert {"number", "rouge_l"} == {task.metric for task in recipe.tasks if task.eval}


def test_a_recipe_is_a_suite(tmp_path: Path) -> None:
    data = MINIMAL | {"sequence": {"max_length": 32}, "evaluation": {"batch_size": 5}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    suite = read_suite(tmp_path / "recipe.yaml")
    assert ([task.name for task in suite.tasks if task.eval], suite.max_length, suite.batch_size) == (["sums"], 32, 5)
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"schema": "molora.suite/1", "tasks": [MINIMAL["tasks"][1]]}))
    with pytest.raises(ValueError, match="no task has an eval section"):
        read_suite(tmp_path / "suite.yaml")
    (tmp_path / "other.yaml").write_text("schema: something\n")
    with pytest.raises(ValueError, match="schema must be molora.suite/1 or molora.recipe/1, got 'something'"):
        read_suite(tmp_path / "other.yaml")
