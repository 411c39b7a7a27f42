"""What the installed vLLM can run, read from its source files: to import it takes seconds.

Every function answers None where the source no longer says it in this way. vLLM itself then has
the word, when it starts.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

GENERATING = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS")
SUPPORTS_LORA = "SupportsLoRA"


def runs(architecture: str) -> bool | None:
    """Whether vLLM has a model that generates text for a name of `architectures` in `config.json`."""
    if architecture in (_generating() or {}):
        return True
    if _generating() is None or _extended() or _in_transformers(architecture):
        return None
    return False


@cache
def adapts(architecture: str) -> bool | None:
    """Whether vLLM's model of that architecture takes LoRA adapters."""
    found = (_generating() or {}).get(architecture)
    if found is None:
        return None
    module, name = found
    full = module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}"
    return _inherits(full, name, SUPPORTS_LORA)


@cache
def vocabulary_limit() -> int | None:
    """The largest vocabulary whose output layer takes adapters."""
    found = re.search(r"vocab_size > (\d+)", _text("vllm.lora.layers.logits_processor"))
    return int(found[1]) if found else None


@cache
def cpu_head_sizes() -> tuple[int, ...] | None:
    """The head sizes that vLLM's attention has on a CPU."""
    pattern = r"def get_supported_head_sizes\(cls\) -> list\[int\]:\s+return \[([\d, ]+)\]"
    found = re.search(pattern, _text("vllm.v1.attention.backends.cpu_attn"))
    return tuple(int(size) for size in found[1].split(",")) if found else None


@cache
def _generating() -> dict[str, tuple[str, str]] | None:
    """(module, class) by architecture."""
    models: dict[str, tuple[str, str]] = {}
    for node in _tree("vllm.model_executor.models.registry").body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            name = ast.unparse(node.targets[0])
            if name in GENERATING:
                try:
                    models |= ast.literal_eval(node.value)
                except ValueError:
                    return None
    return models or None


def _extended() -> bool:
    """A package that plugs itself into vLLM may bring architectures."""
    return any(
        not plugin.value.startswith("vllm.")
        for plugin in entry_points(group="vllm.general_plugins")
    )


def _in_transformers(architecture: str) -> bool:
    """vLLM runs what it does not know by transformers' code, where it can."""
    import transformers

    return hasattr(transformers, architecture)


@cache
def _inherits(module: str, name: str, base: str) -> bool | None:
    """Whether a class has a base class of that name, in whichever modules of vLLM those are."""
    tree = _tree(module)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if name not in classes:
        origin = _imported_from(tree, module, name)
        return None if origin is None else _inherits(*origin, base)
    answers = []
    for parent in classes[name].bases:
        if isinstance(parent, ast.Subscript):
            parent = parent.value
        if not isinstance(parent, ast.Name):
            continue
        if parent.id == base:
            return True
        if parent.id in classes or _imported_from(tree, module, parent.id):
            answers.append(_inherits(module, parent.id, base))
    return True if True in answers else None if None in answers else False


def _imported_from(tree: ast.Module, module: str, name: str) -> tuple[str, str] | None:
    """The module of vLLM, and the name in it, that a module imports as `name`."""
    package = module if _file(module).name == "__init__.py" else module.rpartition(".")[0]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -(node.level - 1) or None] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                if (alias.asname or alias.name) == name and source.startswith("vllm."):
                    return source, alias.name
    return None


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_text(module))


def _text(module: str) -> str:
    file = _file(module)
    return file.read_text() if file.exists() else ""


def _file(module: str) -> Path:
    """The source file of a module of vLLM, which need not be there."""
    vllm = importlib.util.find_spec("vllm")
    folders = (vllm.submodule_search_locations if vllm else None) or ["vllm-is-not-installed"]
    path = Path(folders[0], *module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
