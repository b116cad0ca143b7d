"""README and docs/: their Python runs as printed, their commands, recipes and suites are accepted."""

import json
import shlex
import tomllib

import pytest
import torch
import transformers as hf
import typer
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import config as datasets_config
from peft import LoraConfig, get_peft_model
from torch.distributed.run import get_args_parser as torchrun_parser
from torch.utils.data import DataLoader

from doc_fences import PAGES, ROOT, fences, text_of
from dynlora.cli.main import app
from dynlora_lab.bench.suite import Cell, read_suite
from dynlora_lab.tasks.recipe import read_recipe, recipe_from
from tiny_classifier import SPECIAL, WORDS, save_encoder, save_texts, tiny_tokenizer

DOCS = [page for page in PAGES if page.startswith("docs/")]  # README's Python: test_readme.py
ANY_RECIPE = (
    ROOT / "lab" / "recipes" / "paper" / "roberta-base" / "cola.yaml"
)  # for my.yaml and the like

pytestmark = pytest.mark.filterwarnings(
    "ignore",
    "error:.*:Warning:dynlora",
    "ignore:.*gained nothing on the held-out rows",  # in 12 steps
)


def tiny_bert():
    hf.set_seed(0)
    sizes = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.BertConfig(vocab_size=50, intermediate_size=40, **sizes)
    return hf.BertForSequenceClassification(config)


def save_chat_model(folder):
    """A Llama of two layers, 64 wide (one block of 4-bit codes), whose tokenizer knows chats."""
    hf.set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = hf.LlamaConfig(vocab_size=len(SPECIAL + WORDS), num_attention_heads=2, **sizes)
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    words = tiny_tokenizer()
    words.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    words.save_pretrained(folder)


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder with what the pages name, hub ids as local folders, and the names they start from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_encoder(tmp_path / "FacebookAI" / "roberta-base")
    save_chat_model(tmp_path / "Qwen" / "Qwen3-0.6B")
    chats = tmp_path / "trl-lib" / "Capybara"
    chats.mkdir(parents=True)
    row = json.dumps({"text": "a good film"})
    (chats / "train.jsonl").write_text("\n".join([row] * 96), encoding="utf8")
    save_texts(tmp_path / "texts.csv")
    lora = LoraConfig(r=16, target_modules="all-linear")
    get_peft_model(tiny_bert(), lora).save_pretrained(tmp_path / "my-r64-lora")
    recipe = {
        "task": "text-classification",
        "model": "FacebookAI/roberta-base",
        "output": "runs/recipe",
        "data": {"name": "texts.csv"},
        "adapter": {"target_r": 2},
        "training": {"max_steps": 12, "eval_strategy": "no", "save_strategy": "no"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf8")
    ids = torch.randint(0, 50, (24, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row[0] % 2} for row in ids]
    return {
        "args": hf.TrainingArguments("runs/own", max_steps=12, save_steps=5, report_to=[]),
        "base": tiny_bert(),
        "data": data,
        "fresh_base": tiny_bert(),
        "loader": DataLoader(data, batch_size=2),
        "new_base": tiny_bert,
    }


@pytest.mark.parametrize("page", [page for page in DOCS if fences(page, "python")])
def test_the_python_of_a_page_runs_from_top_to_bottom(page, shop):
    for fence in fences(page, "python"):
        fence.run(shop)


def commands(fence):
    """Its lines as argument lists, comments and variables before the command left out."""
    lines = fence.text.replace("\\\n", " ").splitlines()
    for words in (shlex.split(line, comments=True) for line in lines):
        while words and "=" in words[0]:
            words.pop(0)
        if words:
            yield words


def check_dynlora(arguments):
    """Parse with the real command line; recipes and suites that are named are read."""
    command = typer.main.get_command(app)
    context = command.make_context("dynlora", list(arguments))
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    named = context.params.get("recipe") or context.params.get("suite")
    if named is not None and named.parts[0] == "lab":
        assert (ROOT / named).is_file(), named
    if context.info_name == "train" and "[--field" not in context.args:
        known = ROOT / named
        read_recipe(known if known.is_file() else ANY_RECIPE, context.args)
    if context.info_name == "bench" and named is not None:
        assert set(context.params["cell"] or ()) <= cells_of(read_suite(ROOT / named))


def cells_of(suite):
    return {
        Cell(task=task, method=method, learning_rate=rate, seed=seed).key
        for task in suite.tasks
        for method in suite.methods
        for rate in suite.rates(task, method)
        for seed in suite.seeds
    }


def check_launched(parser, arguments):
    """A launcher's own options, and what it launches."""
    options = parser.parse_args(arguments)
    if options.module:
        assert options.training_script == "dynlora"
        check_dynlora(options.training_script_args)
    else:
        assert options.training_script.startswith("train")  # the reader's own script


def check(words):
    program, *arguments = words
    if program == "dynlora":
        check_dynlora(arguments)
    elif program == "make":
        makefile = text_of("Makefile")
        assert all(f"\n{target}:" in makefile for target in arguments), arguments
    elif program == "pip":
        assert arguments[0] == "install"
        for package in arguments[1:]:
            name, _, wanted = package.rstrip("]").partition("[")
            project = {"dynlora": "pyproject.toml", "dynlora-lab": "lab/pyproject.toml"}[name]
            extras = tomllib.loads(text_of(project))["project"]["optional-dependencies"]
            assert set(filter(None, wanted.split(","))) <= set(extras), package
    elif program == "accelerate":
        assert arguments[0] == "launch"
        check_launched(launch_command_parser(), arguments[1:])
    elif program == "torchrun":
        check_launched(torchrun_parser(), arguments)
    else:
        raise AssertionError(f"no test knows the command {program!r}")


COMMANDS = [
    pytest.param(words, id=f"{fence}: {' '.join(words)}")
    for page in PAGES
    for fence in fences(page, "bash")
    for words in commands(fence)
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_that_a_page_prints_is_accepted(words):
    check(words)


def test_a_wrong_option_or_recipe_would_not_be_accepted():
    for words in (
        ["dynlora", "export", "out", "--too", "uniform"],
        ["dynlora", "export", "out", "--to", "gguf"],
        ["dynlora", "train", "my.yaml", "--target_rank", "3"],
        ["dynlora", "bench", "lab/suites/absent.yaml"],
        ["dynlora", "bench", "lab/suites/paper-glue.yaml", "--cell", "rte--dynlora--lr1--seed1"],
        ["torchrun", "--nproc_per_node", "2", "-m", "dynlora", "trian", "recipe.yaml"],
        ["make", "coffee"],
    ):
        with pytest.raises((Exception, SystemExit)):  # each parser has its own
            check(words)


YAML = [pytest.param(f, id=str(f)) for page in PAGES for f in fences(page, "yaml")]


@pytest.mark.parametrize("fence", YAML)
def test_yaml_of_a_page_is_a_recipe_or_a_suite(fence, tmp_path):
    fields = yaml.safe_load(fence.text)
    if "tasks" not in fields:
        recipe_from(fields)
        return
    for folder in ("recipes", "suites"):
        (tmp_path / folder).mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_bytes(ANY_RECIPE.read_bytes())
    suite = tmp_path / "suites" / "mine.yaml"
    suite.write_text(fence.text, encoding="utf8")
    read_suite(suite)


def test_every_fence_is_of_a_kind_that_some_test_reads():
    for page in PAGES:
        found = fences(page)
        assert text_of(page).count("```") == 2 * len(found), page
        kinds = {fence.language for fence in found}
        assert kinds <= {"python", "bash", "yaml", "diff", "bibtex", ""}, page
