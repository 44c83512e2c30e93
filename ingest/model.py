"""Loading the model to be captured: the shipped one, a folder, the hub, or one in memory."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from actstore.ingest.parameters import dtype_name, encode_parameters
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.architecture import Architecture, architecture_of
from actstore.store.model.dimensions import ModelDimensions, unsupported_model
from actstore.store.model.parameters import EncodedParameters
from actstore.store.model.weights import ModelWeights

__all__ = ["LoadedModel", "load_model"]

_DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_HUB_SECONDS = 10.0
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be captured.

    Attributes:
        model: the causal language model; one loaded here is in evaluation mode and its
            parameters take no gradient, one given in memory is left as it is.
        tokenizer: its tokenizer; None when it has none (token ids can be ingested).
        name: ``demo``, the hub id, or the folder's name; never a path.
        revision: the hub's commit.
        architecture: how its modules map to locations.
        dimensions: its sizes.
        device: where it runs.
        dtype: what it runs in.
        parameters: its parameters as the store keeps them.
        stored_dtype: dtype of those; holds ``dtype``'s values exactly.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    revision: str | None
    architecture: Architecture
    dimensions: ModelDimensions
    device: torch.device
    dtype: torch.dtype
    parameters: EncodedParameters
    stored_dtype: torch.dtype

    @property
    def fingerprint(self) -> str:
        """sha256 over the parameters as stored."""
        return self.parameters.fingerprint

    def weights(self) -> ModelWeights:
        """The weights by location, with the values that the store's own reader gives."""
        return ModelWeights(self.architecture, self.dimensions, self.parameters)


Model = str | os.PathLike[str] | tuple[PreTrainedModel, PreTrainedTokenizerBase | None]


def load_model(
    model: Model,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
) -> LoadedModel:
    """Load a model for capture. Runs no code from a checkpoint and reads no pickle.

    Args:
        model: ``"demo"`` (the shipped model), a folder, a hub id, or
            ``(model, tokenizer)``; the tokenizer may be None.
        device: a torch device, or ``auto``: CUDA where there is one. A model in memory
            stays where it is.
        dtype: ``float16``, ``bfloat16``, ``float32``, ``float64``, or ``auto``: the
            checkpoint's own on an accelerator; on a CPU float32 for a float16
            checkpoint. A model in memory keeps its own.
        revision: branch, tag or commit of a hub model. The commit is resolved once and
            recorded; without a connection the cached files are used.

    Raises:
        InvalidInput: there is no such model, its architecture is not supported, its
            weights are incomplete or not safetensors, or an argument does not apply.
    """
    if isinstance(model, tuple):
        if device != "auto" or dtype != "auto" or revision is not None:
            raise _invalid(
                "device, dtype and revision cannot be given with a model in memory. Load or "
                "convert the model as you want it to run, then pass (model, tokenizer)"
            )
        return _from_memory(*model)
    place = _device(device)
    wanted = _dtype(dtype)
    name = os.fspath(model)
    if name == "demo":
        from actstore.ingest.demo import DEMO_MODEL

        return _from_files(str(DEMO_MODEL), "demo", None, True, place, wanted)
    if Path(name).is_dir():
        if revision is not None:
            raise _invalid(f"revision {revision!r} applies to hub models, and {name} is a folder")
        return _from_files(name, Path(name).resolve().name, None, True, place, wanted)
    try:
        commit, cached = _resolve(name, revision)
    except HFValidationError as error:
        raise _invalid(
            f"There is no folder {name!r}, and it is no hub id (owner/name) either"
        ) from error
    return _from_files(name, name, commit, cached, place, wanted)


def _from_files(
    source: str,
    name: str,
    revision: str | None,
    local: bool,
    device: torch.device,
    wanted: torch.dtype | None,
) -> LoadedModel:
    options: dict[str, Any] = {
        "revision": revision,
        "local_files_only": local,
        "trust_remote_code": False,
    }
    with _loading(source, local), _quiet():
        # Before the weights, which may be many gigabytes.
        config, _ = PreTrainedConfig.get_config_dict(source, **options)
        architecture_of(config).dimensions(config)
        declared = _DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))))
        if wanted is None and declared is not None:
            wanted = _automatic(declared, device)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            **options,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that the report names them
            dtype=wanted or "auto",
            output_loading_info=True,
        )
    model, report = loaded
    _check_complete(source, report)
    model = model.to(device=device)
    runs_in = wanted or _automatic(model.dtype, device)
    if model.dtype != runs_in:
        # Never for a dtype that was loaded: a cast would round the rotary frequencies too.
        model = model.to(dtype=runs_in)
    model.eval().requires_grad_(False)
    with _loading(source, local):
        tokenizer = _tokenizer(source, options)
    return _described(model, tokenizer, name, revision)


def _from_memory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> LoadedModel:
    if not isinstance(model, PreTrainedModel):
        raise _invalid(
            f"A {type(model).__name__} is no transformers model. Pass a causal language model, "
            "as AutoModelForCausalLM.from_pretrained returns it"
        )
    name = Path(str(model.config.name_or_path or "")).name
    return _described(model, tokenizer, name or "in-memory", None)


def _described(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str,
    revision: str | None,
) -> LoadedModel:
    config = model.config.to_dict()
    architecture = architecture_of(config)
    architecture.dimensions(config)
    _check_modules(model, architecture)
    places = {(tensor.device, tensor.dtype) for tensor in model.parameters()}
    if len(places) != 1:
        found = ", ".join(sorted(f"{dtype_name(dtype)} on {device}" for device, dtype in places))
        raise unsupported_model(f"its parameters are spread over {found}, not of one kind")
    ((device, dtype),) = places
    if dtype not in _DTYPES.values():
        raise unsupported_model(f"its parameters are {dtype_name(dtype)}")
    dimensions = architecture.dimensions(config, dtype_name(dtype))
    _check_rotation(model, dimensions)
    parameters, stored_dtype = encode_parameters(model.state_dict())
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        revision=revision,
        architecture=architecture,
        dimensions=dimensions,
        device=device,
        dtype=dtype,
        parameters=parameters,
        stored_dtype=stored_dtype,
    )


def _check_modules(model: PreTrainedModel, architecture: Architecture) -> None:
    modules = dict(model.named_modules())
    head: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = {tap.module_name(0) for tap in architecture.taps.values()}
    missing = sorted(names - modules.keys())
    if missing or head is None:
        raise unsupported_model(
            f"a {type(model).__name__} lacks {', '.join(missing) or 'a language-modelling head'}; "
            "it must be a causal language model as AutoModelForCausalLM loads it"
        )


def _check_rotation(model: PreTrainedModel, dimensions: ModelDimensions) -> None:
    known = [rotary.frequencies() for rotary in dict.fromkeys(dimensions.rotary)]
    for name, buffer in model.named_buffers():
        if not name.endswith("inv_freq") or "original" in name:
            continue
        found = buffer.detach().float().cpu()
        # Accelerators may differ in the last bit; half precision differs in the third digit.
        if not any(
            found.shape == one.shape and torch.allclose(found, one, rtol=1e-5, atol=0)
            for one in known
        ):
            raise unsupported_model(
                f"its rotary frequencies {name} are not those of its config; a model that was "
                f"cast with .to({dtype_name(buffer.dtype)}) has rounded them, and one loaded with "
                "from_pretrained(…, dtype=…) has not"
            )


def _check_complete(source: str, report: Mapping[str, Any]) -> None:
    # transformers fills what it misses with random numbers and only warns.
    wrong = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if wrong:
        raise _invalid(
            f"The weights of {source!r} are incomplete: {', '.join(wrong[:5])}"
            f"{' …' if len(wrong) > 5 else ''} missing or of the wrong shape. "
            "Fetch the checkpoint again"
        )


def _tokenizer(source: str, options: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        # transformers makes an empty one for some families, and fails for others.
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise _invalid(
            f"The tokenizer of {source!r} cannot be loaded: {error} To ingest token ids without "
            "one, load the model yourself and pass (model, None)"
        ) from error
    # Without any file of a tokenizer, transformers makes one that knows no token.
    return tokenizer if tokenizer.vocab_size else None


def _automatic(checkpoint: torch.dtype, device: torch.device) -> torch.dtype:
    # CPUs have no float16 arithmetic worth using; float32 holds float16 exactly.
    return torch.float32 if (device.type, checkpoint) == ("cpu", torch.float16) else checkpoint


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _invalid(f"Device {device!r} cannot be used here: {error}") from error
    return place


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if dtype == "auto":
        return None
    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype
    if name not in _DTYPES:
        raise _invalid(f"A model cannot run in dtype {name!r}; known: auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _resolve(name: str, revision: str | None) -> tuple[str | None, bool]:
    """The commit of a hub model, and whether only cached files can be had."""
    try:
        return model_info(name, revision=revision, timeout=_HUB_SECONDS).sha, False
    except Exception:  # noqa: BLE001 - no network, a proxy, a gate: the cache may hold it
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    # Cached files lie in a folder named after their commit.
    return (Path(config).parent.name if isinstance(config, str) else revision), True


@contextmanager
def _loading(source: str, local: bool) -> Iterator[None]:
    try:
        yield
    except InvalidInput:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        hint = (
            "it must hold config.json and model.safetensors"
            if Path(source).is_dir()
            else "it is neither cached nor reachable; check the name and the connection"
            if local
            else "check the name, the revision and your access"
        )
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise _invalid(f"Cannot load the model {source!r}: {hint}. Cause: {cause[0]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(f"{message.rstrip('.')}.", kind=ErrorKind.INVALID_ARGUMENT)
