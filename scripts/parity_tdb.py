"""Compare derived scalars with a folder of the Transformer Debugger's recorded outputs.

    python scripts/parity_tdb.py FOLDER [--through disk] [--quiet]

The folder's manifest alone says what is run and compared: prompts, objectives, traces,
ablations, autoencoders, nodes. Errors are relative to the maximum over all layers of the
expected value. Exits with 1 above the tolerance, or when anything was left out.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

import actstore
from actstore.ingest.model import LoadedModel, load_model
from actstore.ingest.objectives import LogitDiff, LogitMinusMean, Objective, Probabilities, Zero
from actstore.prompt import Prompt
from actstore.query.derived import SCALARS, DerivedScalar
from actstore.query.derived.config import DstConfig
from actstore.query.derived.evaluation import RawValues, evaluate, layers_of
from actstore.store.errors import ActstoreError
from actstore.store.model.autoencoder_families import Autoencoders
from actstore.store.model.autoencoder_formats import load_autoencoders
from actstore.store.nodes import (
    Ablation,
    ActivationIndex,
    AttentionTraceType,
    AttnSubNodeIndex,
    NodeIndex,
    PreOrPostAct,
    TraceConfig,
)
from actstore.store.vocabulary import (
    ActivationLocationType,
    NodeType,
    PassType,
    WeightLocationType,
)

if TYPE_CHECKING:
    from actstore.store.model.autoencoders import Autoencoder

L = ActivationLocationType
Array = npt.NDArray[Any]

TOLERANCE = {"prompt": 1e-9, "disk": 1e-4}
SCALED = (L.ATTN_QUERY, L.ATTN_KEY)

# The original's names of locations, where they are not ours (activation_location_type).
LOCATION_NAMES = {
    "resid.post_emb": L.RESID_POST_EMBEDDING,
    "attn_ln.scale": L.ATTN_INPUT_LAYER_NORM_SCALE,
    "attn.q": L.ATTN_QUERY,
    "attn.k": L.ATTN_KEY,
    "attn.v": L.ATTN_VALUE,
    "attn.qk_logits": L.ATTN_QK_LOGITS,
    "attn.qk_probs": L.ATTN_QK_PROBS,
    "attn.v_out": L.ATTN_WEIGHTED_SUM_OF_VALUES,
    "resid.delta_attn": L.RESID_DELTA_ATTN,
    "resid.post_attn": L.RESID_POST_ATTN,
    "mlp_ln.scale": L.MLP_INPUT_LAYER_NORM_SCALE,
    "mlp.pre_act": L.MLP_PRE_ACT,
    "mlp.post_act": L.MLP_POST_ACT,
    "resid.delta_mlp": L.RESID_DELTA_MLP,
    "resid.post_mlp": L.RESID_POST_MLP,
    "resid.ln_f.scale": L.RESID_FINAL_LAYER_NORM_SCALE,
}

# Where the original gives the one pass under the other's name: scalar -> the recorded pass.
SWAPPED = {
    "previous_layer_resid_post_mlp": PassType.FORWARD,
    "attn_write_norm": PassType.BACKWARD,
    "flattened_attn_post_softmax": PassType.BACKWARD,
    "always_one": PassType.BACKWARD,
}
POSTPROCESSORS = {
    "ResidualWriteConverter": "residual_write",
    "TokenWriteConverter": "token_write",
    "ResidualReadConverter": "residual_read",
    "TokenReadConverter": "token_read",
    "TokenPairAttributionConverter": "token_pair_attribution",
}
ON_PURPOSE = {
    "pass": "the original gives the other pass under this name; compared with that one",
    "bias": "the original leaves b_out out of what the autoencoder reads; compared without it",
}


def location(name: str) -> ActivationLocationType:
    return LOCATION_NAMES.get(name) or ActivationLocationType[name.upper()]


def indices(given: list[Any]) -> tuple[int | None, ...]:
    return tuple(None if one in (None, "All") else int(one) for one in given)


def node(given: dict[str, Any]) -> NodeIndex:
    members = (
        NodeType[given["node_type"]],
        indices(given["tensor_indices"]),
        given["layer_index"],
        PassType[given["pass_type"]],
    )
    if given.get("q_k_or_v"):
        return AttnSubNodeIndex(*members, q_k_or_v=location(given["q_k_or_v"]))
    return NodeIndex(*members)


def trace(given: dict[str, Any] | None) -> TraceConfig | None:
    if given is None:
        return None
    kind = given["attention_trace_type"]
    return TraceConfig(
        node(given["node_index"]),
        PreOrPostAct[given["pre_or_post_act"]],
        given["detach_layer_norm_scale"],
        AttentionTraceType[kind] if kind else None,
        trace(given["downstream_trace_config"]),
    )


def ablation(given: dict[str, Any]) -> Ablation:
    index = given["index"]
    place = ActivationIndex(
        location(index["activation_location_type"]),
        indices(index["tensor_indices"]),
        index["layer_index"],
        PassType(index["pass_type"].lower()),
    )
    return Ablation(place, given["value"])


def objective(run: dict[str, Any]) -> Objective | None:
    if run["loss"] is None:
        return None
    name = run["loss"]["name"]
    if name == "zero":
        return Zero()
    ids = run["loss_token_ids"]
    target, distractor = tuple(ids["target"]), tuple(ids["distractor"] or ())
    if name == "logit_diff":
        return LogitDiff(target, distractor or None)
    kinds: dict[str, type[LogitMinusMean | Probabilities]] = {
        "logit_minus_mean": LogitMinusMean,
        "probs": Probabilities,
    }
    return kinds[name](target)


@dataclass
class Tally:
    """What was compared so far."""

    tolerance: float
    is_quiet: bool
    compared: Counter[str] = field(default_factory=Counter)
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    on_purpose: Counter[str] = field(default_factory=Counter)
    unheld: dict[str, str] = field(default_factory=dict)
    refused: int = 0

    def note(self, kind: str, run: str, name: str, error: float, remark: str = "") -> None:
        self.compared[kind] += 1
        if error >= self.worst.get(kind, (-1.0, ""))[0]:
            self.worst[kind] = (error, f"{run} {name}")
        bad = not error <= self.tolerance
        if bad:
            self.failures.append(f"{run} {name}: {error:.2e}")
        if bad or not self.is_quiet:
            mark = "FAILS" if bad else "ok"
            print(f"{mark:5} {error:8.1e}  {kind:13} {run:60} {name} {remark}".rstrip())

    def refuse(self, kind: str, run: str, name: str, reason: object) -> None:
        self.compared[kind] += 1
        self.failures.append(f"{run} {name}: refused: {reason}")
        print(f"REFUSED        {kind:13} {run:60} {name}: {reason}")


class Folder:
    """A folder of reference outputs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = json.loads((path / "manifest.json").read_text())
        prompts = json.loads((path / "prompts.json").read_text())
        self.prompts = {one["id"]: tuple(one["token_ids"]) for one in prompts}
        listing = path / "saes" / "saes.json"
        found = json.loads(listing.read_text()) if listing.exists() else {}
        self.inputs = {
            name: entry["input_dst"] for name, entry in found.items() if not name.startswith("_")
        }
        self._autoencoders: dict[str, list[Autoencoder]] = {}

    @cached_property
    def model(self) -> LoadedModel:
        return load_model(str(self.path / "hf_model"), dtype="float64")

    def arrays(self, file: str) -> dict[int | None, Array]:
        """Layer -> array of a recorded file."""
        inside = self.path / Path(*Path(file).parts[1:])
        with np.load(inside if inside.exists() else self.path / file) as stored:
            return {
                None if key == "layer_none" else int(key.removeprefix("layer_")): stored[key]
                for key in stored.files
            }

    def autoencoders(self, run: str, inputs: list[str]) -> Autoencoders | None:
        """Those that a run speaks of: by the run's name, else the first of each input."""
        chosen: list[Autoencoder] = []
        for read in inputs:
            fitting = [name for name, of in self.inputs.items() if of == read.lower()]
            named = [name for name in fitting if name in run.replace(".", "/").split("/")]
            name = (named or fitting)[0]
            if name not in self._autoencoders:
                self._autoencoders[name] = load_autoencoders(self.path / "saes", name)
            chosen += self._autoencoders[name]
        return Autoencoders(chosen) if chosen else None

    def config(self, entry: dict[str, Any]) -> DstConfig:
        given = entry["config"]
        inputs = [given["autoencoder_context"]] if "autoencoder_context" in given else []
        inputs += list(given.get("multi_autoencoder_context", {}).values())
        attributed = given.get("node_index_for_attribution")
        faked = given.get("activation_index_for_fake_grad")
        return DstConfig(
            layer_indices=given.get("layer_indices"),
            derive_gradients=given.get("derive_gradients", False),
            autoencoders=self.autoencoders(entry["run"], inputs),
            trace_config=trace(given.get("trace_config")),
            node_index_for_attribution=node(attributed) if attributed else None,
            detach_layer_norm_scale_for_attribution=given.get(
                "detach_layer_norm_scale_for_attribution", False
            ),
            activation_index_for_fake_grad=ActivationIndex(
                location(faked["activation_location_type"]),
                indices(faked["tensor_indices"]),
                faked["layer_index"],
            )
            if faked
            else None,
        )

    def without_bias(self, config: DstConfig) -> DstConfig | None:
        """The config with what makes its offline latents the original's; None for no change."""
        if config.autoencoders is None:
            return None
        biased = [one for one in config.autoencoders if one.location is L.RESID_DELTA_MLP]
        if not biased:
            return None
        weights = self.model.weights()
        changed = []
        for one in config.autoencoders:
            if one.location is L.RESID_DELTA_MLP:
                bias = weights.weight(WeightLocationType.MLP_OUTPUT_BIAS, one.layer)
                wide = one.to(torch.float64)
                one = replace(wide, input_bias=wide.input_bias + torch.from_numpy(bias))
            changed.append(one)
        return replace(config, autoencoders=Autoencoders(changed))


def error_of(found: dict[int | None, Array], expected: dict[int | None, Array]) -> float:
    """The greatest difference over the greatest expected value of all layers."""
    greatest = difference = 0.0
    for layer, wanted in expected.items():
        given = found[layer]
        if given.shape != wanted.shape:
            return np.inf
        finite = np.isfinite(wanted)
        if not np.array_equal(given[~finite], wanted[~finite], equal_nan=True):
            return np.inf
        if not np.isfinite(given[finite]).all():
            return np.inf
        greatest = max(greatest, float(np.abs(wanted[finite]).max(initial=0)))
        difference = max(difference, float(np.abs(given[finite] - wanted[finite]).max(initial=0)))
    return difference / greatest if greatest else difference


def compare_raw(folder: Folder, entries: list[Any], values: RawValues, tally: Tally) -> None:
    for entry in entries:
        place, kind = location(entry["activation_location_type"]), PassType[entry["pass_type"]]
        run, name = f"{entry['run']}/{entry['prompt']}", f"{place}.{kind}"
        try:
            found = {}
            expected = folder.arrays(entry["file"])
            for layer in expected:
                tensor = values.raw(place, kind, layer)
                if place in SCALED and layer is not None:
                    factor = values.dimensions.attention_scaling(layer) ** 0.5
                    tensor = tensor * factor if kind is PassType.FORWARD else tensor / factor
                if place.is_pair_shaped:
                    tensor = tensor.transpose(1, 2)
                found[layer] = tensor.numpy()
        except ActstoreError as error:
            tally.refuse("raw", run, name, error)
            continue
        tally.note("raw", run, name, error_of(found, expected))


def compare_scalars(folder: Folder, entries: list[Any], values: RawValues, tally: Tally) -> None:
    for entry in entries:
        declared, kind = SCALARS[entry["dst_value"]], PassType[entry["pass_type"]]
        run, name = f"{entry['run']}/{entry['prompt']}", f"{declared.name}.{kind}"
        try:
            config = folder.config(entry)
            remark = ""
            if config.derive_gradients and SWAPPED.get(declared.name) is kind:
                kind = next(other for other in PassType if other is not kind)
                remark = ON_PURPOSE["pass"]
            if declared.name.endswith(("autoencoder_latent", "autoencoder_write_norm")) and (
                not declared.name.startswith("online")
            ):
                unbiased = folder.without_bias(config)
                if unbiased is not None:
                    config, remark = unbiased, ON_PURPOSE["bias"]
            expected = folder.arrays(entry["file"])
            found = derived(declared, values, config, kind, expected)
        except ActstoreError as error:
            tally.refuse("scalar", run, name, error)
            continue
        if remark:
            tally.on_purpose[remark] += 1
        tally.note("scalar", run, name, error_of(found, expected), f"({remark})" if remark else "")


def derived(
    declared: DerivedScalar,
    values: RawValues,
    config: DstConfig,
    pass_type: PassType,
    expected: dict[int | None, Array],
) -> dict[int | None, Array]:
    layers = set(layers_of(declared, values.dimensions.n_layers, config))
    missing = expected.keys() - layers
    if missing:
        raise actstore.Unavailable(
            f"{declared.name} exists at layers {sorted(map(str, layers))}, not at {missing}.",
            kind=actstore.ErrorKind.NOT_STORED,
        )
    return {
        layer: evaluate(declared, values, layer, config=config, pass_type=pass_type).numpy()
        for layer in expected
    }


def all_runs(folder: Folder) -> list[dict[str, Any]]:
    listed = folder.manifest["runs"]
    return list(listed.values()) if isinstance(listed, dict) else listed


def runs_of(folder: Folder) -> Iterator[tuple[dict[str, Any], list[Any], list[Any]]]:
    """Every run with its raw and derived entries."""
    for run in all_runs(folder):
        key = (run["run"], run["prompt"])
        raw, scalars = (
            [one for one in folder.manifest[kind] if (one["run"], one["prompt"]) == key]
            for kind in ("raw", "dst")
        )
        yield run, raw, scalars


def from_prompts(folder: Folder, tally: Tally) -> None:
    for run, raw, scalars in runs_of(folder):
        prompt = Prompt(
            folder.model,
            folder.prompts[run["prompt"]],
            objective=objective(run),
            trace=trace(run["trace_config"]),
            ablations=[ablation(one) for one in run["ablations"]],
            autoencoders=folder.autoencoders(run["run"], list((run["autoencoders"] or {}).values()))
            or (),
        )
        expected = run["loss_value"] if run["trace_config"] is None else None
        if expected is None:
            expected = run["activation_value_for_backward_pass"]
        if expected is not None:
            value = prompt.objective_value
            error = abs(value - expected) / abs(expected) if value is not None else np.inf
            tally.note("objective", f"{run['run']}/{run['prompt']}", "objective", error)
        compare_raw(folder, raw, prompt.values, tally)
        compare_scalars(folder, scalars, prompt.values, tally)


def unheld(run: dict[str, Any]) -> str:
    """Why a store cannot hold a run; empty where it can."""
    if run["trace_config"] is not None:
        return "its objective is a node of one prompt"
    if run["ablations"]:
        return "it ablates values or gradients of one prompt"
    return ""


def through_disk(folder: Folder, tally: Tally, scratch: Path) -> None:
    names = list(folder.prompts)
    corpus = [list(folder.prompts[name]) for name in names]
    stores: dict[str, actstore.Store] = {}
    for run, raw, scalars in runs_of(folder):
        name = f"{run['run']}/{run['prompt']}"
        reason = unheld(run)
        if reason:
            tally.unheld[name] = reason
            continue
        asked = objective(run) or Zero()
        if asked.name not in stores:
            stores[asked.name] = actstore.ingest(
                (folder.model.model, None),
                corpus,
                scratch / str(len(stores)),
                locations="full,logits",
                objective=asked,
                gradients="full,logits",
                dtype="float32",
                segment_rows=512,
                context=max(map(len, corpus)),
            )
        store = stores[asked.name]
        values = store.sources.sequence(store.row_map.sequence(names.index(run["prompt"])))
        held = [one for one in raw if not location(one["activation_location_type"]).is_online]
        compare_raw(folder, held, values, tally)
        compare_scalars(folder, scalars, values, tally)


def compare_postprocessors(folder: Folder, tally: Tally) -> None:
    listing = folder.path / "postprocessors.json"
    if not listing.exists():
        return
    recorded = json.loads(listing.read_text())
    several: dict[str, str] = next(
        (one["autoencoders"] for one in all_runs(folder) if len(one["autoencoders"] or ()) > 1), {}
    )
    prompts: dict[tuple[str, str], Prompt] = {}
    with np.load(folder.path / "postprocessors.npz") as arrays:
        for entry in recorded["outputs"]:
            given, prompt = entry["autoencoders"], entry["prompt"]
            run = f"postprocessors/{given}/{prompt}"
            name = POSTPROCESSORS[entry["postprocessor"]]
            asked = node(entry["node_index"])
            try:
                if (given, prompt) not in prompts:
                    inputs = list(several.values())
                    if given != "multi":
                        inputs = [folder.inputs[given]] if given in folder.inputs else []
                    prompts[given, prompt] = Prompt(
                        folder.model,
                        folder.prompts[prompt],
                        autoencoders=folder.autoencoders(given, inputs) or (),
                    )
                found = prompts[given, prompt].postprocess(name, asked).numpy()
            except ActstoreError as error:
                tally.refuse("postprocessor", run, f"{name} {asked.node_type}", error)
                continue
            off = error_of({None: found}, {None: arrays[entry["key"]]})
            tally.note("postprocessor", run, f"{name} {asked.node_type}", off)
    tally.refused += len(recorded["errors"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--through", choices=("prompt", "disk"), default="prompt")
    parser.add_argument("--quiet", action="store_true", help="print what fails, and the sums")
    options = parser.parse_args(arguments)
    folder = Folder(options.folder)
    tally = Tally(TOLERANCE[options.through], options.quiet)
    if options.through == "prompt":
        from_prompts(folder, tally)
        compare_postprocessors(folder, tally)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            through_disk(folder, tally, Path(scratch))
    return report(folder, tally)


def report(folder: Folder, tally: Tally) -> int:
    print(f"\n{folder.path.name}: {sum(tally.compared.values())} comparisons")
    for kind, count in tally.compared.items():
        error, where = tally.worst.get(kind, (np.nan, ""))
        print(f"  {kind:13} {count:5} compared, worst error {error:.1e} ({where})")
    for remark, count in tally.on_purpose.items():
        print(f"  on purpose, {count} times: {remark}")
    for name, reason in tally.unheld.items():
        print(f"  not through a store: {name}: {reason}")
    refused = len(folder.manifest.get("failures", [])) + tally.refused
    print(f"  {refused} derivations that the original refused have no recorded value")
    print(f"  {len(tally.failures)} above {tally.tolerance:.0e} or refused")
    for line in tally.failures[:50]:
        print(f"    {line}")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
