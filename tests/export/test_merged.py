"""Merged exports: what is written computes what the adapter on its base computes, labels included."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from dynlora.export import export_adapter
from dynlora.export.models import BaseModel
from older_peft import LORA_ONLY
from stock_runs import run, stock
from tiny_models import (
    VOCABULARY,
    adapted,
    logits,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    train,
)

CLOSE = {"rtol": 0, "atol": 1e-6}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True` and the tied_target"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]


def tied_llama():
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


def merged(model, build, tmp_path, **options):
    """The folder of the merged model, and what the export says."""
    if build is not None:
        build().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "in")
    options = {"base": str(tmp_path / "base"), **options}
    return export_adapter(tmp_path / "in", tmp_path / "out", to="merged", **options)


def trained(build, **fields):
    """A stock adapter with other values than the start's in all that is trained."""
    model = stock(build, init_lora_weights=False, **fields)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
    return model.eval()


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"use_dora": True},
    ],
    ids=lambda f: " ".join(f"{k}={v}" for k, v in f.items()),
)
@pytest.mark.parametrize("build", [tiny_llama, tied_llama])
def test_trained_tokens_and_heads_are_merged_over_tied_and_untied_embeddings(
    tmp_path, build, fields
):
    model = trained(build, task_type="CAUSAL_LM", **fields)
    expected = logits(model)
    done = merged(model, build, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=2e-5)
    touches = "embed_tokens" in str(fields) or "lm_head" in str(fields)
    is_untied = build is tied_llama and touches
    assert loaded.config.tie_word_embeddings == (build is tied_llama and not touches)
    assert ("two weights now" in done.note) == is_untied
    assert done.max_difference <= 1e-4 * done.max_output


@pytest.mark.parametrize("fields", [LORA_ONLY, {"bias": "all"}, {}])
def test_an_adapter_with_pruned_modules_is_merged(tmp_path, fields):
    model = stock(tiny_gpt2, fan_in_fan_out=True, task_type="CAUSAL_LM", **fields)
    run(model)
    expected = logits(model)
    merged(model, tiny_gpt2, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), expected, **CLOSE)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_gated_checkpoint_is_merged_and_the_bases_other_files_come_along(tmp_path):
    model = adapted(tiny_llama, task_type="CAUSAL_LM")
    train(model, steps=30, total_steps=40)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    merged(model, tiny_llama, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_the_dtype_is_the_bases_or_the_asked_one(tmp_path):
    model = trained(tiny_llama, task_type="CAUSAL_LM")
    merged(model, lambda: tiny_llama().to(torch.bfloat16), tmp_path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    options = {"to": "merged", "base": str(tmp_path / "base"), "dtype": torch.float32}
    export_adapter(tmp_path / "in", tmp_path / "wide", **options)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype == torch.float32


def test_an_encoder_with_a_decoder_and_a_model_of_pictures_are_merged(tmp_path):
    model = trained(tiny_t5, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    assert merged(model, tiny_t5, tmp_path / "t5").max_output > 0
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = ViTConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4)
    set_seed(0)
    base = ViTForImageClassification(config)
    base.save_pretrained(tmp_path / "vit" / "base")
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, lora)
    done = merged(model, None, tmp_path / "vit")
    assert 0 < done.max_difference + 1e-12 < 1e-4 < done.max_output


# -- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [["anger", "joy", "fear"], ["anger"], None], ids=str)
def test_a_merged_classifier_answers_with_the_class_names_of_its_run(tmp_path, record):
    model = trained(tiny_bert, task_type="SEQ_CLS")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "run.json").write_text(json.dumps({"data": {"labels": record}}))
    merged(model, tiny_bert, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    names = record if record and len(record) == 3 else ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert loaded.config.id2label == dict(enumerate(names))
    assert loaded.config.label2id == {name: i for i, name in enumerate(names)}


def test_a_head_of_another_size_brings_its_number_of_labels(tmp_path):
    """The base was pretrained without labels, so its config counts transformers' two."""
    fields = {k: v for k, v in tiny_bert().config.to_dict().items() if "label" not in k}
    BertModel(BertConfig(**fields)).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    model = trained(lambda: base, task_type="SEQ_CLS")
    expected = logits(model)
    merged(model, None, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.id2label == {i: f"LABEL_{i}" for i in range(5)}
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)


def test_labels_are_counted_at_the_output_not_at_a_dense_layer_before_it(tmp_path):
    config = DistilBertConfig(vocab_size=101, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    DistilBertModel(config).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    heads = ["pre_classifier", "classifier"]
    model = trained(lambda: base, task_type="SEQ_CLS", exclude_modules=heads, modules_to_save=heads)
    tokens = torch.arange(12).view(2, 6)
    expected = model(input_ids=tokens).logits
    merged(model, None, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)


def test_a_damaged_record_beside_an_adapter_is_named(tmp_path):
    model = trained(tiny_bert, task_type="SEQ_CLS")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json is damaged .* remove it to go without"):
        merged(model, tiny_bert, tmp_path)
    assert not (tmp_path / "out").exists()


# -- refusals ------------------------------------------------------------------------------------


def test_a_merge_that_computes_something_else_leaves_nothing(tmp_path, monkeypatch):
    model = trained(tiny_llama, task_type="CAUSAL_LM")
    monkeypatch.setattr(BaseModel, "adapted", _with_a_lost_adapter(BaseModel.adapted))
    with pytest.raises(
        RuntimeError, match="what was written, loaded again, differs from the adapter"
    ):
        merged(model, tiny_llama, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "in"]


def _with_a_lost_adapter(load):
    """PEFT's loading, of a model whose merge forgets the adapter."""

    def loaded(*arguments, **options):
        model = load(*arguments, **options)
        model.merge_and_unload = model.unload
        return model

    return loaded


def test_another_base_model_is_noticed_before_anything_is_written(tmp_path):
    model = trained(tiny_llama, task_type="CAUSAL_LM")
    for build in (tiny_gpt2, lambda: LlamaForCausalLM(wider())):
        with pytest.raises(
            ValueError, match=r"does not fit on base=.*not the adapter's base model"
        ):
            merged(model, build, tmp_path)
    assert not (tmp_path / "out").exists()


def wider():
    return LlamaConfig(**{**tiny_llama().config.to_dict(), "hidden_size": 32, "head_dim": 16})


def test_a_class_that_names_modules_otherwise_is_not_taken_for_the_base(tmp_path):
    """PEFT would warn, load nothing, and merge nothing."""
    model = trained(tiny_llama)
    with pytest.raises(ValueError, match="does not fit on base=.*name the right one"):
        merged(model, tiny_llama, tmp_path, model_class="AutoModel")
    with pytest.raises(ValueError, match="model_class='Car' is not a class of transformers"):
        merged(model, tiny_llama, tmp_path, model_class="Car")
    merged(model, tiny_llama, tmp_path)  # the base's config names its class


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        ("quantised", ValueError, "is quantised: an update cannot be added to its weights"),
        (
            "nowhere",
            FileNotFoundError,
            "base='.*nowhere' is not a model that transformers can load",
        ),
        (None, ValueError, "does not name its base model; give its folder"),
    ],
    ids=str,
)
def test_a_base_that_cannot_be_added_to_is_refused(tmp_path, base, error, message):
    model = trained(tiny_llama)
    tiny_llama().save_pretrained(tmp_path / "quantised")
    file = tmp_path / "quantised" / "config.json"
    quantised = {"quantization_config": {"load_in_8bit": True, "quant_method": "bitsandbytes"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantised))
    with pytest.raises(error, match=message):
        merged(model, tiny_llama, tmp_path, base=base and str(tmp_path / base))
    assert not (tmp_path / "out").exists()
