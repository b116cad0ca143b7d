"""Text classification and regression: labels, metrics, baselines, GLUE's layouts."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, EvalPrediction, ViTConfig

from dynlora_lab.tasks.base_model import BaseModel
from dynlora_lab.tasks.data import Splits
from dynlora_lab.tasks.text_classification import FAMILY, Options, measure, read
from dynlora_lab.tasks.typed_fields import RecipeError
from tiny_classifier import save_encoder


def splits_of(train, evals, features=None):
    evals = evals if isinstance(evals, dict) else {"": evals}
    made = {k: Dataset.from_list(v, features=features) for k, v in evals.items()}
    return Splits(train=Dataset.from_list(train, features=features), evals=made)


def labelled(*labels):
    return [{"text": f"good film {i}", "label": label} for i, label in enumerate(labels)]


def measured(options, labels, predictions):
    prediction = EvalPrediction(predictions=np.array(predictions), label_ids=np.array(labels))
    return measure(options, "", prediction)


def test_labels_may_be_words_numbers_or_class_labels():
    for labels in ("abba", [0, 1, 1, 0]):
        data = read(Options(), splits_of(labelled(*labels), labelled(labels[0])))
        assert data.labels == sorted({str(x) for x in labels})
        assert data.train["labels"][:] == [0, 1, 1, 0]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    data = read(Options(), splits_of(labelled(1, 0), labelled(1), features))
    assert data.labels == ["no", "yes"]
    assert data.evals[""]["labels"][:] == [1]


@pytest.mark.parametrize(
    ("train", "evals", "options", "message"),
    [
        ("ab", "c", {}, "label 'c' occurs in the evaluation split but not in train"),
        ("aa", "a", {}, r"holds 1 class\(es\) to train on"),
        (["a", "b", None], "a", {}, "row 2 of train has nothing in column 'label'"),
        ([0.5, 1.5], [0.5], {}, "holds fractions; set options.is_regression"),
        ("ab", "a", {"is_regression": True}, "label 'a', which is no number"),
        ("ab", "a", {"label": "y"}, "column 'y' is missing in train"),
        ("ab", "a", {"texts": ("text", "other")}, "column 'other' is missing in train"),
    ],
)
def test_unfit_labels_are_refused(train, evals, options, message):
    with pytest.raises(RecipeError, match=message):
        read(Options(**options), splits_of(labelled(*train), labelled(*evals)))


def test_unlabelled_rows_of_a_class_column_are_refused():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    with pytest.raises(RecipeError, match="row 0 of the evaluation split has the label -1"):
        read(Options(), splits_of(labelled(1, 0), labelled(-1), features))


def test_class_columns_that_differ_are_refused():
    one = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    other = Features({"text": Value("string"), "label": ClassLabel(names=["yes", "no"])})
    splits = Splits(
        train=Dataset.from_list(labelled(1, 0), features=one),
        evals={"": Dataset.from_list(labelled(1), features=other)},
    )
    with pytest.raises(RecipeError, match="of the evaluation split has other classes"):
        read(Options(), splits)


def test_metrics_are_the_customary_ones():
    options = Options(metrics=("matthews", "accuracy", "f1"))
    logits = [[1, 0], [0, 1], [0, 1], [1, 0], [0, 1]]
    labels, answers = [0, 1, 0, 0, 1], [0, 1, 1, 0, 1]
    assert measured(options, labels, logits) == pytest.approx(
        {
            "matthews": matthews_corrcoef(labels, answers),
            "accuracy": 0.8,
            "f1": f1_score(labels, answers),
        }
    )


def test_correlations_of_a_regression():
    found = measured(Options(is_regression=True), [1.0, 2.0, 4.0], [[10.0], [20.0], [30.0]])
    assert found == pytest.approx(
        {"pearson": np.corrcoef([1, 2, 4], [1, 2, 3])[0, 1], "spearman": 1.0}
    )


def test_a_constant_answer_has_no_correlation():
    assert measured(Options(is_regression=True), [1.0, 2.0], [[3.0], [3.0]])["pearson"] == 0


def test_baselines_are_those_of_the_majority_of_train():
    data = read(
        Options(metrics=("accuracy", "matthews")),
        splits_of(labelled(*"aab"), {"m": labelled(*"aabb"), "mm": labelled("a")}),
    )
    assert data.baselines == {"accuracy": 0.75, "matthews": 0.0}
    numbers = read(Options(is_regression=True), splits_of(labelled(0, 1), labelled(1, 2)))
    assert numbers.baselines == {"pearson": 0.0, "spearman": 0.0}


def test_pairs_are_read_together_and_cut(tmp_path):
    rows = [{"premise": "good film " * 30, "hypothesis": "bad", "label": i % 2} for i in range(4)]
    options = Options(texts=("premise", "hypothesis"), max_length=8)
    data = read(options, splits_of(rows, {"matched": rows[:2], "mismatched": rows[2:]}))
    prepared = FAMILY.prepare(options, data, BaseModel(name=save_encoder(tmp_path)))
    assert set(prepared.evals) == {"matched", "mismatched"}
    assert len(prepared.train[0]["input_ids"]) == 8
    assert prepared.head == ["classifier"]


def test_a_skeleton_has_the_same_shapes_and_no_weights(tmp_path):
    data = read(Options(), splits_of(labelled(*"abc"), labelled("a")))
    folder = save_encoder(tmp_path)
    real, bare = (
        FAMILY.prepare(Options(), data, BaseModel(name=folder, is_skeleton=skeleton))
        for skeleton in (False, True)
    )
    assert {n: p.shape for n, p in real.model.named_parameters()} == {
        n: p.shape for n, p in bare.model.named_parameters()
    }
    assert bare.head == real.head
    assert all(p.is_meta for p in bare.model.parameters())


def test_a_model_without_such_a_head_is_refused(tmp_path):
    ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    base = BaseModel(name=str(tmp_path))
    with pytest.raises(
        RecipeError, match="is a vit, for which transformers has no AutoModelForSeq"
    ):
        base.model(AutoModelForSequenceClassification, num_labels=2)
    with pytest.raises(RecipeError, match="cannot be read"):
        BaseModel(name=str(tmp_path / "absent")).config()


def test_evaluation_rows_are_batched_by_length_and_keep_their_labels(tmp_path):
    words = ["film", "good good film", "good film", "good good good film"]
    rows = [{"text": t, "label": len(t.split()) % 2} for t in words]
    save_encoder(tmp_path)
    data = read(Options(), splits_of(rows, rows))
    prepared = FAMILY.prepare(Options(), data, BaseModel(name=str(tmp_path)))
    ids = prepared.evals[""]["input_ids"]
    assert [len(row) - 2 for row in ids] == [4, 3, 2, 1]  # beside [CLS] and [SEP]
    assert prepared.evals[""]["labels"][:] == [0, 1, 0, 1]
    assert [len(row) - 2 for row in prepared.train["input_ids"]] == [1, 3, 2, 4]
