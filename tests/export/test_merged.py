"""Merged classifiers: the names and the number of their classes."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, DistilBertConfig, DistilBertModel

from dynlora.export import export_adapter
from tiny_models import adapted, tiny_bert, train


@pytest.mark.parametrize("record", [["anger", "joy", "fear"], ["anger"], None], ids=str)
def test_a_merged_classifier_answers_with_the_class_names_of_its_run(tmp_path, record):
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    model = adapted(lambda: base, task_type="SEQ_CLS")
    train(model)
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "run.json").write_text(json.dumps({"data": {"labels": record}}))
    export_adapter(tmp_path / "in", tmp_path / "out", to="merged", base=str(tmp_path / "base"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    given = (
        record if record and len(record) == 3 else ["LABEL_0", "LABEL_1", "LABEL_2"]
    )  # the base's
    assert merged.config.id2label == dict(enumerate(given))
    assert merged.config.label2id == {name: i for i, name in enumerate(given)}


def test_labels_are_counted_at_the_output_not_at_a_dense_layer_before_it(tmp_path):
    config = DistilBertConfig(vocab_size=101, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    DistilBertModel(config).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    heads = ["pre_classifier", "classifier"]
    model = adapted(
        lambda: base,
        task_type="SEQ_CLS",
        exclude_modules=heads,
        modules_to_save=heads,
        init_lora_weights=False,
    )
    model.save_pretrained(tmp_path / "in")
    export_adapter(tmp_path / "in", tmp_path / "out", to="merged", base=str(tmp_path / "base"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert merged.config.num_labels == 5
    tokens = torch.arange(12).view(2, 6)
    expected = model.eval()(input_ids=tokens).logits
    torch.testing.assert_close(merged(input_ids=tokens).logits, expected, rtol=0, atol=1e-6)


def test_a_damaged_record_beside_an_adapter_is_named(tmp_path):
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    model = adapted(lambda: base, task_type="SEQ_CLS")
    train(model)
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json is damaged .* remove it to go without"):
        export_adapter(tmp_path / "in", tmp_path / "out", to="merged", base=str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()
