"""Pictures with questions: a whole run on a tiny LLaVA, what counts in the loss, what is refused."""

import json

import numpy as np
import pytest
import torch
from datasets import Array2D, ClassLabel, Features, Value
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from dynlora_lab.tasks.base_model import BaseModel
from dynlora_lab.tasks.image_text_to_text import Options, batch_of, picture_of, prepare, read
from dynlora_lab.tasks.typed_fields import RecipeError
from tiny_recipes import run_rows, splits_of

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
WORDS = "<pad> <unk> <image> </s> user assistant what is it ? where bright dark light left right"
FEATURES = Features(
    image=Array2D((8, 8), "uint8"),
    question=Value("string"),
    answer=Value("string"),
    kind=ClassLabel(names=["shade", "place"]),
)


def row(seed):
    is_light, asks_place = seed % 2, seed // 2 % 2
    shades = np.random.default_rng(seed).integers(0, 60, (8, 8))
    if asks_place:
        shades[:, 4 * is_light : 4 * is_light + 4] += 190
        question, answer = "where is it bright ?", ("left", "right")[is_light]
    else:
        shades += 190 * is_light
        question, answer = "what is it ?", ("dark", "light")[is_light]
    image = shades.astype(np.uint8).tolist()
    return {"image": image, "question": question, "answer": answer, "kind": asks_place}


ROWS = splits_of([row(seed) for seed in range(48)], features=FEATURES)


def save_base(folder, template=TEMPLATE):
    vocabulary = {word: number for number, word in enumerate(WORDS.split())}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "<image>", "</s>")])
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **named)
    vision = ViTConfig(
        image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=2, vision_feature_layer=-1
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    pixels = ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    LlavaProcessor(
        pixels, tokenizer, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def run_questions(tmp_path, **fields):
    return run_rows(
        tmp_path,
        ROWS,
        task="image-text-to-text",
        model=save_base(tmp_path / "base"),
        options={"group": "kind", "max_new_tokens": 3},
        **fields,
    ).record


def test_a_trained_model_writes_the_right_answers_and_they_are_kept(tmp_path):
    record = run_questions(
        tmp_path, method="full", training={"num_train_epochs": 20, "learning_rate": 3e-3}
    )
    metrics = record["metrics"]
    assert record["baselines"]["exact_match"] == 50.0
    assert record["evaluations"][0]["eval_exact_match"] <= 50.0
    assert metrics["eval_exact_match"] >= 90.0
    by_kind = [metrics["eval_exact_match_shade"], metrics["eval_exact_match_place"]]
    assert sum(by_kind) / 2 == pytest.approx(metrics["eval_exact_match"])
    lines = (tmp_path / "run" / "written.jsonl").read_text(encoding="utf8").splitlines()
    answers = [json.loads(line) for line in lines]
    last = [a for a in answers if a["evaluation"] == 1]
    right = sum(a["written"] == a["expected"] for a in last)
    assert 100 * right / len(last) == pytest.approx(metrics["eval_exact_match"])
    assert AutoProcessor.from_pretrained(tmp_path / "run").chat_template == TEMPLATE


def test_both_towers_share_one_budget_and_the_record_has_their_ranks(tmp_path):
    record = run_questions(tmp_path, training={"num_train_epochs": 3})
    towers = {name.split(".")[1] for name in record["ranks"]}
    assert towers == {"vision_tower", "multi_modal_projector", "language_model"}
    assert record["budget"]["components_end"] < record["budget"]["components_start"]
    assert sum(record["ranks"].values()) == record["budget"]["components_end"]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_only_the_answer_and_its_end_count_in_the_loss(tmp_path):
    processor = AutoProcessor.from_pretrained(save_base(tmp_path / "base"))
    rows = read(Options(), ROWS).train.select(range(4))
    batch = batch_of(processor, list(rows))
    for number, labels in enumerate(batch["labels"]):
        counted = batch["input_ids"][number][labels != -100]
        assert processor.tokenizer.decode(counted).split() == [rows[number]["answer"], "</s>"]
    assert batch["pixel_values"].shape == (4, 3, 8, 8)


def test_a_template_that_writes_another_prompt_before_an_answer_is_refused(tmp_path):
    odd = TEMPLATE.replace(
        "{% if add_gen", "{% if messages | length > 1 %}?{% endif %}{% if add_gen"
    )
    odd = odd.replace(
        "{{ m['role'] }}", "{% if messages | length > 1 %}? {% endif %}{{ m['role'] }}"
    )
    processor = AutoProcessor.from_pretrained(save_base(tmp_path / "base", odd))
    with pytest.raises(RecipeError, match="chat template writes another prompt before an answer"):
        batch_of(processor, list(read(Options(), ROWS).train.select(range(2))))


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    base = BaseModel(name=save_base(tmp_path / "base", template=None))
    with pytest.raises(RecipeError, match="a LlavaProcessor without a chat template"):
        prepare(Options(), read(Options(), ROWS), base)


def test_captions_ask_every_picture_the_same_and_are_scored_by_rouge():
    options = Options(prompt="Describe it.", is_column=False, metric="rouge")
    data = read(options, ROWS)
    assert set(data.train["question"][:]) == {"Describe it."}
    assert set(data.baselines) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}


def test_pictures_are_given_in_colour():
    grey = np.array([[0, 255]], dtype=np.uint8)
    assert picture_of(grey).getpixel((1, 0)) == (255, 255, 255)
    assert picture_of(Image.fromarray(grey)).mode == "RGB"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"generate_rows": 0}, "generate_rows=0 must be at least 1"),
        ({"metric": "rouge", "group": "kind"}, "group='kind' counts exact matches by kind"),
    ],
)
def test_options_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Options(**fields)


def test_a_missing_column_names_the_option_that_chose_it():
    with pytest.raises(RecipeError, match=r"column 'photo' is missing .* set options\.image"):
        read(Options(image="photo"), ROWS)
