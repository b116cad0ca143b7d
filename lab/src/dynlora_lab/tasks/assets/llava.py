"""A small model that answers questions on pictures: half the ViT of clothes, a projector, a new Llama."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from dynlora_lab.tasks.assets.pictures import CLOTHES, MEAN, STD, pixels_of
from dynlora_lab.tasks.assets.scenes import CORNERS, NUMBERS

BATCH = 64
SEEING_STEPS = 300
STEPS = 600
LAYERS = 2  # of each tower; the ViT of clothes has four
LEARNING_RATE = 2e-3
IGNORED = -100

PAD, UNKNOWN, IMAGE, END = "<pad>", "<unk>", "<image>", "</s>"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} :"
    "{% for part in message['content'] %} "
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% if message['role'] == 'assistant' %} </s>{% else %} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)
WORDS = "user assistant : what is at the where how many things are there comes after ?"


def build_llava(parts: Mapping[str, Path], destination: Path) -> None:
    """A folder that AutoModelForImageTextToText and AutoProcessor read, trained here on clothes."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    vision = _in_colour(
        ViTModel.from_pretrained(parts["vit-fashion-mnist"], add_pooling_layer=False)
    )
    model = LlavaForConditionalGeneration(_config(vision.config, tokenizer))
    model.model.vision_tower.load_state_dict(vision.state_dict(), strict=False)
    processor = LlavaProcessor(
        ViTImageProcessorPil(
            size={"height": 28, "width": 28}, image_mean=[MEAN] * 3, image_std=[STD] * 3
        ),
        tokenizer,
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    rows = Dataset.from_parquet(str(parts["clothes-scenes"] / "train.parquet"))
    patches = (vision.config.image_size // vision.config.patch_size) ** 2
    pixels, tokens, labels = _inputs(rows, tokenizer, patches=patches)
    _train_to_see(model.model.vision_tower, pixels, torch.tensor(rows["corners"][:]))
    _train_to_answer(model, pixels, tokens, labels)
    model.eval().save_pretrained(destination)
    processor.save_pretrained(destination)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: the vocabulary is closed."""
    words = [*WORDS.split(), *" ".join(CORNERS).split(), *CLOTHES, *NUMBERS]
    vocabulary = dict.fromkeys([PAD, UNKNOWN, IMAGE, END, *words])
    numbered = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbered, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (PAD, IMAGE, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )


def _in_colour(vision: ViTModel) -> ViTModel:
    """The first layers, the same function of a grey picture that is given as red, green and blue."""
    fields = {**vision.config.to_dict(), "num_channels": 3, "num_hidden_layers": LAYERS}
    made = ViTModel(ViTConfig(**fields), add_pooling_layer=False)
    kept = made.state_dict().keys()
    state = {name: value for name, value in vision.state_dict().items() if name in kept}
    name = next(key for key in state if key.endswith("patch_embeddings.projection.weight"))
    state[name] = state[name].repeat(1, 3, 1, 1) / 3
    made.load_state_dict(state)
    return made


def _config(vision: ViTConfig, tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def _inputs(
    rows: Dataset, tokenizer: PreTrainedTokenizerFast, *, patches: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (rows, 3, 28, 28), tokens and labels (rows, length) as the processor would make them."""
    images = torch.from_numpy(np.stack(rows.with_format("numpy")["image"][:]).astype(np.float32))
    texts = [
        f"user : {IMAGE * patches} {question} assistant : {answer} {END}"
        for question, answer in zip(rows["question"][:], rows["answer"][:], strict=True)
    ]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    answers = [2 + patches + len(question.split()) + 2 for question in rows["question"][:]]
    places = torch.arange(tokens.shape[1])
    is_answer = (places >= torch.tensor(answers)[:, None]) & (tokens != tokenizer.pad_token_id)
    labels = torch.where(is_answer, tokens, IGNORED)
    return pixels_of(images).expand(-1, 3, -1, -1), tokens, labels


def _train_to_see(vision: Any, pixels: Tensor, corners: Tensor) -> None:
    """Every patch learns what is in its corner: a linear head on top says so, and is thrown away.

    Args:
        vision: the ViT.
        pixels: (rows, 3, 28, 28).
        corners: (rows, 4), the thing in each corner, -1 where there is none.
    """
    head = torch.nn.Linear(vision.config.hidden_size, len(CLOTHES) + 1)
    side = vision.config.image_size // vision.config.patch_size
    places = corners.view(-1, 2, 2).repeat_interleave(side // 2, 1).repeat_interleave(side // 2, 2)
    targets = places.flatten(1) + 1  # (rows, patches), 0 is nothing

    def loss(rows: Tensor) -> Tensor:
        seen = vision(pixels[rows], output_hidden_states=True).hidden_states[-1][:, 1:]
        return cross_entropy(head(seen).transpose(1, 2), targets[rows])

    _train([*vision.parameters(), *head.parameters()], loss, rows=len(pixels), steps=SEEING_STEPS)


def _train_to_answer(model: Any, pixels: Tensor, tokens: Tensor, labels: Tensor) -> None:
    def loss(rows: Tensor) -> Tensor:
        made = model(input_ids=tokens[rows], pixel_values=pixels[rows], labels=labels[rows])
        return made.loss

    _train(list(model.parameters()), loss, rows=len(tokens), steps=STEPS)


def _train(
    parameters: list[Tensor], loss_of: Callable[[Tensor], Tensor], *, rows: int, steps: int
) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    order = torch.cat([torch.randperm(rows) for _ in range(1 + steps * BATCH // rows)])
    for chosen in order.split(BATCH)[:steps]:
        loss = loss_of(chosen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
