"""The bundled base `mini`, its three adapters and held-out rows; and how a base's name resolves.

Everything lies in `mini/` beside this file and needs no network. `mini/CARD.md` says how it was
made, from what, and under which licences.
"""

from __future__ import annotations

from pathlib import Path

MINI = "mini"
MINI_DOMAINS = ("math", "medicine", "finance")

_FOLDER = Path(__file__).parent / "mini"


def mini_base() -> Path:
    """Return the folder of the bundled base: config, float16 safetensors, tokenizer."""
    return _FOLDER / "base"


def mini_adapters() -> dict[str, Path]:
    """Return {domain: PEFT folder} of the bundled adapters, which fit `mini_base()`."""
    return {domain: _FOLDER / "adapters" / domain for domain in MINI_DOMAINS}


def held_out(domain: str) -> Path:
    """Return JSONL of questions and answers that no part of the domain's training has seen.

    Raises:
        ValueError: no such bundled domain.
    """
    if domain not in MINI_DOMAINS:
        raise ValueError(f"no bundled domain {domain!r}; there are {', '.join(MINI_DOMAINS)}")
    return _FOLDER / "held_out" / f"{domain}.jsonl"


def resolve_base(name: str) -> Path:
    """Return the folder of a base: `mini`, a transformers folder, or a Hub id such as `owner/name`.

    A folder of that name wins over the Hub; `mini` always is the bundled base (write `./mini` for a
    folder called so). A Hub id is fetched into the Hub's cache, or found there without a network.

    Raises:
        ValueError: neither a folder with a config.json nor a model that the Hub or its cache has.
    """
    if name == MINI:
        return mini_base()
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
            f"({type(error).__name__}); use {MINI}, a folder, or an id such as "
            "openai-community/gpt2 with a network or a filled cache"
        ) from error
