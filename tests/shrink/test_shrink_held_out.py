"""``dynlora shrink`` with held-out texts, and what the command prints."""

import json
import shlex
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    set_seed,
)
from typer.testing import CliRunner

from doc_fences import fences
from dynlora.cli.main import app
from dynlora.errors import VerificationError
from dynlora.export import models
from dynlora.shrink import held_out, shrink_adapter
from test_shrink import ALL, net, trained
from tiny_classifier import SPECIAL, WORDS, save_encoder, save_texts, tiny_tokenizer
from tiny_models import tiny_llama, tiny_t5

pytestmark = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning",
    "ignore:Setting `save_embedding_layers`:UserWarning",
)


def fit(model, texts, labels=None, *, steps=60):
    """A few steps of Adam on all texts."""
    words = tiny_tokenizer()(texts, padding=True, return_tensors="pt")
    ids, mask = words["input_ids"], words["attention_mask"]
    targets = ids.masked_fill(mask == 0, -100) if labels is None else torch.tensor(labels)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=mask, labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


TEXTS = [f"a {x} film {x} a {y} {y} {x}" for x in WORDS[:4] for y in WORDS[:4]]


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A base Llama, a LoRA trained on sentences with a pattern, and other such sentences."""
    root = tmp_path_factory.mktemp("language")
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=len(SPECIAL + WORDS), num_attention_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    model = AutoModelForCausalLM.from_pretrained(root / "base")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    fit(model, TEXTS[::2])
    model.save_pretrained(root / "lora")
    rows = "\n".join(json.dumps({"text": text}) for text in TEXTS[1::2])
    (root / "val.jsonl").write_text(rows + "\n")
    return root


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    root = tmp_path_factory.mktemp("classifier")
    save_encoder(root / "base")
    save_texts(root / "val.csv")
    lines = (root / "val.csv").read_text().splitlines()[1:]
    rows = [(text, int(label == "pos")) for text, label in (line.split(",") for line in lines)]
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=2)
    lora = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(model, lora)
    fit(model, *map(list, zip(*rows, strict=True)))
    model.save_pretrained(root / "lora")
    numbered = "\n".join(f"{text},{label}" for text, label in rows)
    (root / "numbered.csv").write_text(f"text,label\n{numbered}\n")
    return root


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})


def test_the_loss_stays_within_the_tolerance_and_is_that_of_the_written_adapter(language, tmp_path):
    done = shrink_adapter(
        language / "lora", tmp_path / "out",
        model=str(language / "base"), data=language / "val.jsonl", tolerance=0.05,
    )  # fmt: skip
    limit = done.before.loss + 0.05 * (done.loss_without - done.before.loss)
    assert done.after.loss <= limit
    assert done.after.num_bytes < 0.8 * done.before.num_bytes
    assert done.output_difference < 1e-4
    base = AutoModelForCausalLM.from_pretrained(language / "base")
    model = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    assert loss_of(model) == pytest.approx(done.after.loss, rel=1e-4)
    whole = AutoModelForCausalLM.from_pretrained(language / "base")
    model = PeftModel.from_pretrained(whole, str(language / "lora")).eval()
    assert loss_of(model) == pytest.approx(done.before.loss, rel=1e-4)
    with model.disable_adapter():
        assert loss_of(model) == pytest.approx(done.loss_without, rel=1e-4)


@torch.no_grad()
def loss_of(model):
    words = tiny_tokenizer()(TEXTS[1::2], padding=True, return_tensors="pt")
    labels = words["input_ids"].masked_fill(words["attention_mask"] == 0, -100)
    mask = words["attention_mask"]
    return float(model(input_ids=words["input_ids"], attention_mask=mask, labels=labels).loss)


def test_both_orders_are_measured_about_eight_times_and_the_smaller_is_taken(language):
    done = shrink_adapter(
        language / "lora", model=str(language / "base"), data=language / "val.jsonl", tolerance=0.1
    )
    by_order = {"singular values": [], "curvature": []}
    for point in done.points:
        by_order[point.order].append(point)
    for points in by_order.values():
        assert 5 <= len(points) <= held_out_limit()
        assert any(p.is_within for p in points)
    whole, gain = done.before.loss, done.loss_without - done.before.loss
    for point in done.points:
        assert point.gain_lost == pytest.approx((point.loss - whole) / gain)
        assert point.is_within == (point.gain_lost <= 0.1)
    best = min(p.num_bytes for p in done.points if p.is_within)
    assert done.after.num_bytes == best


def held_out_limit():
    from dynlora.shrink.search import EVALUATIONS

    return EVALUATIONS


def test_the_basis_of_curvature_is_the_same_adapter_and_its_worth_foretells_the_loss(language):
    from dynlora.adapter_files.updates import read
    from dynlora.shrink.rows import read_rows
    from dynlora.shrink.spectrum import Spectra, decompose

    adapter = read(language / "lora")
    spectra = Spectra(adapter, [decompose(update) for update in adapter.updates])
    rows = read_rows(language / "val.jsonl")
    held = held_out.HeldOut(
        spectra, language / "lora", str(language / "base"), rows, batch_size=1, max_length=32
    )
    curved, worth = held.curved()
    whole = held.loss(spectra, spectra.everything)
    assert held.loss(curved, curved.everything) == pytest.approx(whole, rel=1e-4)
    for module, values in zip(curved.modules, worth, strict=True):
        assert bool((values.diff() <= 0).all())
        assert torch.allclose(module.left.norm(dim=1), torch.ones(1, module.count), atol=1e-4)
    every = torch.cat([w.expand(1, -1).flatten() for w in worth])
    by_worth = every.argsort()
    rises = []
    for part in (by_worth[: len(by_worth) // 2], by_worth[len(by_worth) // 2 :]):
        mask = torch.ones(len(every), dtype=torch.bool)
        mask[part] = False
        rises.append(held.loss(curved, mask.split([m.count for m in curved.modules])) - whole)
    assert rises[0] < 0.2 * rises[1]


def test_a_rule_of_size_takes_the_order_that_loses_less_on_the_data(language):
    data = {"model": str(language / "base"), "data": language / "val.jsonl"}
    for mean_rank in (1, 2, 4):
        measured = shrink_adapter(language / "lora", mean_rank=mean_rank, **data)
        blind = shrink_adapter(language / "lora", mean_rank=mean_rank)
        kept = shrink_adapter(language / "lora", energy=blind.after.energy, **data)
        assert measured.after.mean_rank <= mean_rank
        assert measured.after.loss <= kept.after.loss * (1 + 1e-6)


def test_gradients_that_are_not_finite_leave_the_order_by_singular_values(language, monkeypatch):
    real = torch.autograd.grad

    def infinite(*arguments, **options):
        return tuple(torch.full_like(g, torch.inf) for g in real(*arguments, **options))

    monkeypatch.setattr(torch.autograd, "grad", infinite)
    done = shrink_adapter(
        language / "lora", model=str(language / "base"), data=language / "val.jsonl", mean_rank=2
    )
    plain = shrink_adapter(language / "lora", mean_rank=2)
    assert done.ranks == plain.ranks


def test_a_cut_that_is_further_from_the_adapter_than_nothing_is_not_taken(language, monkeypatch):
    from dynlora.shrink.spectrum import Spectra

    data = {"model": str(language / "base"), "data": language / "val.jsonl"}
    free = shrink_adapter(language / "lora", mean_rank=1, **data)
    assert free.after.energy > 0
    real = Spectra.energy
    monkeypatch.setattr(Spectra, "energy", lambda self, cut: real(self, cut) - 1)
    done = shrink_adapter(language / "lora", mean_rank=1, **data)
    assert done.ranks == shrink_adapter(language / "lora", mean_rank=1).ranks


def test_fused_experts_of_a_real_model_are_measured_and_load_in_peft(language, tmp_path):
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = MixtralConfig(
        vocab_size=len(SPECIAL + WORDS), num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=3, num_experts_per_tok=2, **sizes,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")

    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora)
    fit(model, TEXTS[::2])
    model.save_pretrained(tmp_path / "lora")
    model.eval()
    done = shrink_adapter(
        tmp_path / "lora", tmp_path / "out",
        model=str(tmp_path / "base"), data=language / "val.jsonl", tolerance=0.05,
    )  # fmt: skip
    assert sum("experts" in name for name in done.ranks) == 4
    assert done.before.loss == pytest.approx(loss_of(model), rel=1e-4)
    assert done.output_difference < 1e-4
    assert done.after.num_bytes < done.before.num_bytes


def test_a_classifier_is_measured_with_its_head_and_labels(classifier, tmp_path):
    done = shrink_adapter(
        classifier / "lora", tmp_path / "out",
        model=str(classifier / "base"), data=classifier / "numbered.csv", tolerance=0.1,
    )  # fmt: skip
    assert done.before.loss < 0.5
    assert done.after.loss <= done.before.loss + 0.1 * (done.loss_without - done.before.loss)
    assert done.output_difference < 1e-4


def test_a_rule_of_energy_reports_losses_too(language):
    done = shrink_adapter(
        language / "lora", energy=0.9, model=str(language / "base"), data=language / "val.jsonl"
    )
    assert done.points == ()
    assert done.after.loss > 0
    assert done.same_rank_size.num_bytes >= done.after.num_bytes
    lost = (done.after.loss - done.before.loss) / (done.loss_without - done.before.loss)
    losses = f"loss {done.before.loss:.3f} -> {done.after.loss:.3f}"
    assert f"{losses} ({lost:.1%} of the gain lost)" in done.conclusion


@torch.no_grad()
def test_a_classifiers_gain_is_measured_against_its_base_with_the_trained_head(classifier):
    texts = classifier / "numbered.csv"
    done = shrink_adapter(
        classifier / "lora", energy=0.5, model=str(classifier / "base"), data=texts
    )
    base = AutoModelForSequenceClassification.from_pretrained(classifier / "base", num_labels=2)
    model = PeftModel.from_pretrained(base, str(classifier / "lora")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.zero_()
    rows = [line.split(",") for line in texts.read_text().splitlines()[1:]]
    words = tiny_tokenizer()([text for text, _ in rows], padding=True, return_tensors="pt")
    mask, labels = words["attention_mask"], torch.tensor([int(label) for _, label in rows])
    loss = model(input_ids=words["input_ids"], attention_mask=mask, labels=labels).loss
    assert done.loss_without == pytest.approx(float(loss), rel=1e-4)


def test_where_nothing_is_gained_no_tolerance_is_accepted_but_a_rule_of_size_is(language, tmp_path):
    """Texts that the base knows better than the adapter: those of another pattern."""
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "film film film film"}) + "\n")
    place = {"model": str(language / "base"), "data": tmp_path / "other.jsonl"}
    message = (
        r"the held-out loss is (\S+) with the adapter and (\S+) without it: nothing is gained on "
        r"data='\S+other.jsonl' of which tolerance=0.003 could be a share.*cut by energy, mean_rank"
    )
    with pytest.raises(ValueError, match=message):
        shrink_adapter(language / "lora", tmp_path / "out", **place)
    assert not (tmp_path / "out").exists()
    done = shrink_adapter(language / "lora", energy=0.9, **place)
    assert done.before.loss >= done.loss_without
    assert f"({done.loss_without:.3f} without the adapter)" in done.conclusion


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("val.txt", "text\na\n", r"must end with .csv or .jsonl"),
        ("val.csv", "text,label\n", r"holds no rows"),
        ("val.csv", "sentence\na film\n", r"no text in row 1: \{'sentence': 'a film'\}"),
        ("val.jsonl", "{\n", r"is not a jsonl file"),
        ("val.jsonl", "[1]\n", r"no text in row 1: \[1\]"),
        ("val.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', r"no label in row 2"),
        ("val.csv", "text\na film\n", r"needs a column 'label'"),
        ("val.csv", "text,label\na film,pos\n", r"label 'pos' in data is not a class"),
        ("val.csv", "text,label\na film,2\n", r"label '2' in data is not a class"),
    ],
)
def test_wrong_data_is_named_with_its_rule(classifier, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        shrink_adapter(classifier / "lora", model=str(classifier / "base"), data=tmp_path / name)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        shrink_adapter(classifier / "lora", model="base", data=tmp_path / "none.csv")


def test_another_base_or_another_task_is_refused(language, classifier, tmp_path):
    trained(tiny_llama, tmp_path / "in", target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(
        ValueError, match=r"does not fit on model=.*not the adapter.s base.*right one \(model\)"
    ):
        shrink_adapter(tmp_path / "in", model=str(language / "base"), energy=0.9)
    with pytest.raises(FileNotFoundError, match="model='nowhere' is not a model that transformers"):
        shrink_adapter(tmp_path / "in", model="nowhere", energy=0.9)
    trained(tiny_t5, tmp_path / "t5", target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    with pytest.raises(ValueError, match="task_type 'SEQ_2_SEQ_LM' of the adapter has no loss"):
        shrink_adapter(tmp_path / "t5", model=str(language / "base"), energy=0.9)


def test_outputs_that_differ_in_peft_are_refused_and_leave_nothing(language, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "TOLERANCE", -1.0)
    monkeypatch.setattr(torch, "finfo", lambda _: type("Info", (), {"eps": 0.0}))
    with pytest.raises(RuntimeError, match="what was written, loaded again, differs"):
        shrink_adapter(
            language / "lora", tmp_path / "out", model=str(language / "base"), energy=0.9
        )
    assert not any(tmp_path.iterdir())


def test_help_fits_80_columns_and_names_exit_codes():
    ran = invoke("shrink", "--help")
    assert ran.exit_code == 0
    assert max(map(len, ran.stdout.splitlines())) <= 80
    assert "dynlora shrink out --energy 0.95 --out out-small" in ran.stdout
    assert "Exit code: 0" in ran.stdout


def test_the_command_prints_tables_in_80_columns_and_writes_nothing(language, tmp_path):
    ran = invoke("shrink", language / "lora")
    assert ran.exit_code == 0, ran.stderr
    tables = [line for line in ran.stdout.splitlines() if str(language) not in line]
    assert max(map(len, tables)) <= 80
    assert "95.0%" in ran.stdout
    assert "Nothing was written" in ran.stdout


def test_the_command_writes_says_so_and_prints_a_config_that_can_be_pasted(tmp_path):
    trained(net, tmp_path / "in", **ALL)
    ran = invoke("shrink", tmp_path / "in", "--energy", "0.95", "--out", tmp_path / "out")
    assert ran.exit_code == 0, ran.stderr
    assert " MB -> " in ran.stdout
    assert "everywhere would have been" in " ".join(ran.stdout.split())
    assert "Verified: every update read back is within" in ran.stdout
    source = ran.stdout[ran.stdout.index("LoraConfig(") :]
    made = eval(source, {"LoraConfig": LoraConfig})  # noqa: S307  # the claim itself
    assert made.rank_pattern
    assert max(map(len, source.splitlines())) <= 80


def test_the_command_prints_loss_against_size_in_80_columns(language, tmp_path):
    ran = invoke(
        "shrink", language / "lora", "--model", language / "base", "--data",
        language / "val.jsonl", "--out", tmp_path / "out", "--tolerance", "0.02",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.stderr
    table = ran.stdout[: ran.stdout.index("LoraConfig(")].splitlines()
    assert max(map(len, table)) <= 80
    assert ran.stdout.count("smallest") == 2
    none = next(line.split() for line in table if line.startswith(" none"))
    assert none[:2] == ["none", "0"]
    assert none[-1] == "100.0%"
    assert "gain lost" in table[0]
    assert "of the gain lost" in " ".join(ran.stdout.split())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_commands_of_the_page_run_as_printed(classifier, tmp_path, monkeypatch):
    shutil.copytree(classifier / "base", tmp_path / "BASE")
    shutil.copytree(classifier / "lora", tmp_path / "out")
    shutil.copy(classifier / "numbered.csv", tmp_path / "val.csv")
    monkeypatch.chdir(tmp_path)
    for fence in fences("docs/shrink.md", "bash"):
        for line in fence.text.splitlines():
            words = shlex.split(line, comments=True)
            ran = invoke(*words[1:])
            assert ran.exit_code == 0, (line, ran.stderr)
            assert "--out" not in words or (tmp_path / words[-1] / "adapter_config.json").is_file()


def test_a_mistake_is_one_line_and_exit_code_2_and_a_failed_check_1(
    language, tmp_path, monkeypatch
):
    ran = invoke("shrink", tmp_path, "--energy", "0.9")
    assert ran.exit_code == 2
    assert ran.stderr.startswith("dynlora: ")
    assert ran.stderr.count("\n") == 1

    def fail(*_):
        raise VerificationError("verification failed")

    monkeypatch.setattr("dynlora.shrink.shrink.verify", fail)
    ran = invoke("shrink", language / "lora", "--energy", "0.9", "--out", tmp_path / "out")
    assert ran.exit_code == 1
    assert not (tmp_path / "out").exists()
