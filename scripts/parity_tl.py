"""Compare the activation cache with a folder of TransformerLens' recorded calls.

    python scripts/parity_tl.py FOLDER [--through disk] [--quiet]

The folder's manifest alone says what is called and compared: method, arguments, values,
shapes and labels, or the error that upstream raised. Our cache speaks as upstream does
(``compat="transformer_lens"``). Exits with 1 above the tolerance, or when a call was answered
in another shape, under other labels, or not at all.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import actstore
from actstore.ingest.model import LoadedModel, load_model
from actstore.prompt import Prompt
from actstore.query.cache import ActivationCache
from actstore.store.errors import ActstoreError

Array = npt.NDArray[Any]
Call = dict[str, Any]

# Upstream computed in float32: on values of 30 its own rounding passes the first of these.
TOLERANCE = 2e-5
OF_GREATEST = 2e-6
COMPAT = "transformer_lens"
WITHOUT_BATCH = "_nobatch"
HOOKS = "hooks"
ASKED_FOR = "USE_ATTN_RESULT."

SHORTHANDS = "shorthands with an underscore name what they say; upstream cannot parse them"
RESULTS = "what heads write is computed when asked for; upstream wants compute_head_results first"
ONE_NEURON = "one neuron is a list of one; upstream cannot label it"
NO_BATCH_NORM = "one position of a cache without a batch axis can be normalised (upstream #1677)"
ONE_ROW = "a cache of one row loses its batch axis; upstream stumbles over the query-key norms"
NORM_SHAPE = "query-key norms keep their axes (batch, position, head); upstream flattens them"


def answered_on_purpose(call: Call) -> str | None:
    """Why we answer what upstream refused; None where we must refuse too."""
    method, given, error = call["method"], call["kwargs"], call["error"]
    key = given.get("key")
    if method == "__getitem__" and error == "KeyError" and isinstance(key, str):
        if key.startswith("result"):
            return RESULTS
        if "_" in key and "." not in key:
            return SHORTHANDS
    if method == "stack_activation" and given.get("activation_name") == "result":
        return RESULTS
    if method == "stack_neuron_results" and isinstance(given.get("neuron_slice"), int):
        return ONE_NEURON
    if (
        method == "accumulated_resid"
        and call["context"].endswith(WITHOUT_BATCH)
        and given.get("apply_ln")
        and isinstance(given.get("pos_slice"), int)
    ):
        return NO_BATCH_NORM
    if method == "remove_batch_dim" and "batch size > 1" not in call["error_message"]:
        return ONE_ROW
    return None


@dataclass
class Tally:
    """What was compared so far."""

    is_quiet: bool
    compared: Counter[str] = field(default_factory=Counter)
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    on_purpose: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    rounded: list[str] = field(default_factory=list)
    unrecorded: set[str] = field(default_factory=set)

    def note(self, method: str, name: str, error: float, greatest: float, remark: str = "") -> None:
        """Count a comparison.

        Args:
            method: upstream's method.
            name: the call.
            error: greatest difference.
            greatest: greatest value expected.
            remark: why the two differ on purpose.
        """
        self.compared[method] += 1
        if TOLERANCE < error <= OF_GREATEST * greatest:
            self.rounded.append(f"{name}: {error:.1e} of values up to {greatest:.0f}")
        if error >= self.worst.get(method, (-1.0, ""))[0]:
            self.worst[method] = (error, name)
        if remark:
            self.on_purpose[remark] += 1
        if not error <= max(TOLERANCE, OF_GREATEST * greatest):
            self.fail(f"{name}: {error:.2e}")
        elif not self.is_quiet:
            print(f"ok    {error:8.1e}  {name} {f'({remark})' if remark else ''}".rstrip())

    def refuse(self, method: str, name: str, ours: Exception, theirs: str) -> None:
        """Both refused."""
        self.compared[method] += 1
        self.refused[theirs] += 1
        if not self.is_quiet:
            print(f"refused         {name}: {type(ours).__name__}, upstream {theirs}")

    def fail(self, line: str) -> None:
        self.failures.append(line)
        print(f"FAILS           {line}")


class Folder:
    """A folder of recorded calls."""

    def __init__(self, path: Path, variant: str = "raw_f32") -> None:
        self.path = path
        self.recorded = path / variant
        self.manifest = json.loads((self.recorded / "manifest.json").read_text())
        prompts = json.loads((path / "prompts.json").read_text())
        self.prompts: dict[str, list[list[int]]] = prompts["prompts"]
        self.targets: dict[str, dict[str, Any]] = prompts["target_tokens"]

    def model(self, dtype: torch.dtype) -> LoadedModel:
        # By ourselves: the folder holds no tokenizer.
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        model = AutoModelForCausalLM.from_pretrained(
            self.path / "hf", dtype=dtype, attn_implementation="eager", local_files_only=True
        )
        return load_model((model, None))

    def calls(self) -> Iterator[tuple[Call, Array | None]]:
        """Every recorded call with its value; None where upstream raised."""
        for file, listed in self.manifest["files"].items():
            if isinstance(listed, dict):
                continue
            with np.load(self.recorded / file) as stored:
                for call in listed:
                    key = call["id"].replace("/", "|")
                    yield call, None if "error" in call else stored[key]

    def hooks(self) -> Iterator[tuple[str, str, Array]]:
        """Every recorded activation: its prompts, its name, its values."""
        for file, listed in self.manifest["files"].items():
            if isinstance(listed, list):
                continue
            context = Path(file).stem.removeprefix("raw_cache_")
            with np.load(self.recorded / file) as stored:
                for name in listed:
                    yield context, name, stored[name]


def decoded(given: Any) -> Any:
    """An argument as it was passed."""
    if isinstance(given, dict) and set(given) == {"tuple"}:
        return tuple(given["tuple"])
    if isinstance(given, dict):
        return {key: decoded(value) for key, value in given.items()}
    return given


def answer(cache: ActivationCache, call: Call, targets: dict[str, Any]) -> tuple[Any, Any]:
    """What our cache says to a recorded call: its values and labels."""
    given = {key: decoded(value) for key, value in call["kwargs"].items()}
    method = call["method"].removeprefix("model.")
    special = SPECIAL.get(method)
    if special is not None:
        return special(cache, given), None
    for name in ("tokens", "incorrect_tokens"):
        if isinstance(given.get(name), str):
            wanted = targets[given[name]]
            given[name] = wanted if isinstance(wanted, int) else torch.tensor(wanted)
    if "residual_stack" in given:
        stack = given["residual_stack"]
        source = getattr(cache, stack.pop("method"))
        given["residual_stack"] = source(**stack)
    if "stack" in given:
        stack = given.pop("stack")
        stack.pop("decompose_resid")
        made = cache.decompose_resid(**stack, pos_slice=given.get("pos_slice"))
        given["residual_stack"] = made
    found = getattr(cache, method)(**given)
    return found if isinstance(found, tuple) else (found, None)


def item(cache: ActivationCache, given: dict[str, Any]) -> Any:
    key = given["key"]
    return cache[tuple(key) if isinstance(key, list) else key]


def sliced(cache: ActivationCache, given: dict[str, Any]) -> Any:
    return cache.apply_slice_to_batch_dim(given["batch_slice"]).stack_activation("resid_post")


def head_results(cache: ActivationCache, given: dict[str, Any]) -> Any:
    before = list(cache)
    for _ in range(given.get("_times", 1)):
        cache.compute_head_results()
    if list(cache) != before:
        raise AssertionError("a read changed the cache")
    return torch.empty(0) if "_times" in given else cache.stack_activation("result")


def without_batch(cache: ActivationCache, _: dict[str, Any]) -> Any:
    return cache.remove_batch_dim()["resid_post", 0]


SPECIAL: dict[str, Callable[[ActivationCache, dict[str, Any]], Any]] = {
    "__getitem__": item,
    "apply_slice_to_batch_dim": sliced,
    "compute_head_results": head_results,
    "remove_batch_dim": without_batch,
}


def error_of(found: Array, expected: Array) -> float:
    """The greatest difference; infinite where one is not finite and the other is."""
    if found.shape != expected.shape:
        return np.inf
    finite = np.isfinite(expected)
    if not np.array_equal(found[~finite], expected[~finite], equal_nan=True):
        return np.inf
    if not np.isfinite(found[finite]).all():
        return np.inf
    wide, wanted = found[finite].astype(np.float64), expected[finite].astype(np.float64)
    return float(np.abs(wide - wanted).max(initial=0))


def greatest_of(expected: Array) -> float:
    return float(np.abs(expected[np.isfinite(expected)]).max(initial=0))


def compare_call(
    cache: ActivationCache, call: Call, expected: Array | None, folder: Folder, tally: Tally
) -> None:
    method, name = call["method"], call["id"]
    prompt = call["context"].removesuffix(WITHOUT_BATCH)
    try:
        values, labels = answer(cache, call, folder.targets[prompt])
    except ActstoreError as error:
        if expected is not None:
            tally.fail(f"{name}: refused: {error}")
        else:
            tally.refuse(method, name, error, call["error"])
        return
    if expected is None:
        reason = answered_on_purpose(call)
        if reason is None:
            tally.fail(f"{name}: answered, where upstream raised {call['error']}")
        else:
            difference = improved_error(cache, call, values, folder)
            tally.note(method, name, difference, 0.0, reason)
        return
    found = values.numpy()
    if list(found.shape) != call["shape"]:
        tally.fail(f"{name}: shape {list(found.shape)}, upstream {call['shape']}")
    elif labels != call["labels"]:
        tally.fail(f"{name}: labels {labels}, upstream {call['labels']}")
    else:
        tally.note(method, name, error_of(found, expected), greatest_of(expected))


def improved_error(
    cache: ActivationCache, call: Call, values: torch.Tensor, folder: Folder
) -> float:
    """How far our answer to what upstream refused is from the same said otherwise."""
    given = {key: decoded(value) for key, value in call["kwargs"].items()}
    if call["method"] == "stack_neuron_results":
        other = cache.stack_neuron_results(**{**given, "neuron_slice": [given["neuron_slice"]]})
        return error_of(values.numpy(), other[0].numpy())
    if call["method"] == "accumulated_resid":
        place = given.pop("pos_slice")
        other = cache.accumulated_resid(**given)
        return error_of(values.numpy(), other[0][:, place].numpy())
    if call["method"] == "__getitem__":
        prompt = call["context"].removesuffix(WITHOUT_BATCH)
        name = full_name(given["key"])
        found = [
            array
            for context, hook, array in folder.hooks()
            if context == prompt and hook.removeprefix(ASKED_FOR) == name
        ]
        if found:
            return error_of(values.numpy().reshape(found[0].shape), found[0])
    return 0.0 if bool(torch.isfinite(values).all()) else np.inf


def full_name(key: str) -> str:
    from actstore.query.cache.names import full_name

    return full_name(key, 10**6)


def compare_hooks(folder: Folder, caches: dict[str, ActivationCache], tally: Tally) -> None:
    """The whole recorded forward pass: names in order, and values."""
    names: dict[str, list[str]] = {}
    for context, hook, expected in folder.hooks():
        name, remark = hook.removeprefix(ASKED_FOR), ""
        if name == hook and hook != "logits":
            names.setdefault(context, []).append(hook)
        try:
            found = caches[context][name].numpy()
        except ActstoreError as error:
            tally.fail(f"{context}/{hook}: refused: {error}")
            continue
        if ".q_norm." in hook or ".k_norm." in hook:
            found, remark = found.reshape(expected.shape), NORM_SHAPE
        difference = error_of(found, expected)
        tally.note(HOOKS, f"{context}/{hook}", difference, greatest_of(expected), remark)
    for context, listed in names.items():
        ours = list(caches[context])
        if [name for name in ours if name in listed] != listed:
            tally.fail(f"{context}: names {ours}, upstream {listed}")
        tally.unrecorded.update(name for name in ours if name not in listed)


def prompt_caches(folder: Folder) -> Callable[[str], ActivationCache]:
    """Caches of fresh passes, by the prompts' name."""
    model = folder.model(torch.float64)
    ran = {name: [Prompt(model, ids) for ids in batch] for name, batch in folder.prompts.items()}
    return lambda name: ran[name][0].cache(*ran[name][1:], compat=COMPAT)


def stored_caches(folder: Folder, scratch: Path) -> Callable[[str], ActivationCache]:
    """Caches of a store that the prompts are ingested into, by the prompts' name."""
    names = [name for name, batch in folder.prompts.items() for _ in batch]
    corpus = [ids for batch in folder.prompts.values() for ids in batch]
    store = actstore.ingest(
        (folder.model(torch.float32).model, None),
        corpus,
        scratch / "store",
        locations="full",
        dtype="float32",
        segment_rows=512,
        context=max(map(len, corpus)),
    )
    return lambda name: store.cache(
        [number for number, own in enumerate(names) if own == name], compat=COMPAT
    )


def compare(folder: Folder, cache_of: Callable[[str], ActivationCache], tally: Tally) -> None:
    """Every recorded activation and call."""
    caches: dict[str, ActivationCache] = {}
    for name in folder.prompts:
        caches[name] = cache_of(name)
    compare_hooks(folder, caches, tally)
    for call, expected in folder.calls():
        context = call["context"]
        if context not in caches:
            caches[context] = cache_of(context.removesuffix(WITHOUT_BATCH)).remove_batch_dim()
        cache = caches[context]
        if call["method"] == "remove_batch_dim":
            cache = cache_of(context)
        compare_call(cache, call, expected, folder, tally)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--through", choices=("prompt", "disk"), default="prompt")
    parser.add_argument("--quiet", action="store_true", help="print what fails, and the sums")
    options = parser.parse_args(arguments)
    folder, tally = Folder(options.folder), Tally(options.quiet)
    if options.through == "prompt":
        compare(folder, prompt_caches(folder), tally)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            compare(folder, stored_caches(folder, Path(scratch)), tally)
    return report(folder, tally)


def report(folder: Folder, tally: Tally) -> int:
    recorded = sum(len(one) for one in folder.manifest["files"].values())
    print(
        f"\n{folder.path.name}: {sum(tally.compared.values())} of {recorded} recorded values and calls"
    )
    for method, count in tally.compared.items():
        error, where = tally.worst.get(method, (np.nan, "refused by both"))
        print(f"  {method:36} {count:4} compared, worst error {error:.1e} ({where})")
    for reason, count in tally.on_purpose.items():
        print(f"  on purpose, {count} times: {reason}")
    if tally.unrecorded:
        print(f"  ours alone has {', '.join(sorted(tally.unrecorded))}")
    for line in tally.rounded:
        print(f"  float32's rounding, {OF_GREATEST:.0e} of the greatest value allowed: {line}")
    for theirs, count in tally.refused.items():
        print(f"  refused by both, {count} times: upstream raised {theirs}")
    print(f"  {len(tally.failures)} above {TOLERANCE:.0e}, in another form, or refused")
    for line in tally.failures[:50]:
        print(f"    {line}")
    left_out = recorded - sum(tally.compared.values()) - len(tally.failures)
    if left_out > 0:
        print(f"  {left_out} were left out")
    return 1 if tally.failures or left_out > 0 else 0


if __name__ == "__main__":
    sys.exit(main())
