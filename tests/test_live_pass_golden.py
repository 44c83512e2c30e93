"""Whole passes, forward and backward, against the outputs of an independent implementation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from passes import ablate, trace_of
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from actstore.ingest.live_pass import LivePass, run_pass
from actstore.ingest.model import LoadedModel, load_model
from actstore.ingest.objectives import LogitDiff, LogitMinusMean, Probabilities
from actstore.store.model.autoencoder_families import Autoencoders
from actstore.store.model.autoencoder_functions import ReLU, TopK
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.nodes import AttentionTraceType, PreOrPostAct
from actstore.store.vocabulary import ActivationLocationType, NodeType, PassType

GOLDEN = Path(__file__).parent / "data" / "tiny_a"
L = ActivationLocationType
N = NodeType
FORWARD, BACKWARD = PassType.FORWARD, PassType.BACKWARD
PRE, POST = PreOrPostAct.PRE, PreOrPostAct.POST
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def golden_model() -> LoadedModel:
    return load_model((GPT2LMHeadModel.from_pretrained(GOLDEN / "hf_model").double(), None))


def golden_prompts() -> dict[str, list[int]]:
    prompts = json.loads((GOLDEN / "prompts.json").read_text())
    return {prompt["id"]: prompt["token_ids"] for prompt in prompts}


def golden_autoencoders(*names: str) -> Autoencoders:
    described = json.loads((GOLDEN / "saes" / "saes.json").read_text())
    members = []
    for name in names:
        for layer, path in enumerate(described[name]["files"]):
            tensors = {key: value.double() for key, value in load_file(GOLDEN / path).items()}
            is_topk = described[name]["activation"] == "TopK"
            members.append(
                Autoencoder(
                    name=f"{name} {layer}",
                    location=ActivationLocationType[described[name]["input_dst"].upper()],
                    layer=layer,
                    encoder=tensors["encoder.weight"].T.contiguous(),
                    decoder=tensors["decoder.weight"].T.contiguous(),
                    latent_bias=tensors["latent_bias"],
                    input_bias=tensors["pre_bias"],
                    output_bias=tensors["pre_bias"],
                    activation=TopK(described[name]["k"]) if is_topk else ReLU(),
                )
            )
    return Autoencoders(members)


LOGIT_DIFF = LogitDiff((5, 40), (9, 61, 70))
HEAD = (14, 8, 2)
NEURON = trace_of(N.MLP_NEURON, (16, 5), 2)
V = AttentionTraceType.V

GOLDEN_RUNS: dict[str, tuple[dict[str, Any], float]] = {
    "logit_diff": ({"objective": LOGIT_DIFF}, -0.3034679341804032),
    "logit_minus_mean": ({"objective": LogitMinusMean(33)}, 0.9503052419062333),
    "probs": ({"objective": Probabilities((5, 40))}, 0.0010140373820946777),
    "target_only": ({"objective": LogitDiff(12)}, -2.1547259363312707),
    "logit_diff_tdb_final_ln_detached": (
        {
            "objective": LOGIT_DIFF,
            "ablations": [ablate(L.RESID_FINAL_LAYER_NORM_SCALE, (), None, 0.0, BACKWARD)],
        },
        -0.3034679341804032,
    ),
    "logit_diff_forward_ablations": (
        {
            "objective": LOGIT_DIFF,
            "ablations": [
                ablate(L.MLP_POST_ACT, (13, 7), 0),
                ablate(L.ATTN_QK_PROBS, (15, None, 1), 1),
            ],
        },
        -0.2871695179308391,
    ),
    "trace_attn_V_loss": (
        {
            "objective": LOGIT_DIFF,
            "trace": trace_of(N.ATTENTION_HEAD, (16, 8, 1), 1, kind=V),
        },
        -0.0023518506897333225,
    ),
    "trace_attn_V_downstream_mlp": (
        {"trace": trace_of(N.ATTENTION_HEAD, (16, 8, 1), 1, kind=V, downstream=NEURON)},
        -0.0007968957218376421,
    ),
    **{
        f"trace_mlp_{act}_detach{int(detach)}": (
            {"trace": trace_of(N.MLP_NEURON, (14, 5), 2, act, detach)},
            value,
        )
        for act, value in ((PRE, -0.17896063475650328), (POST, -0.0767716337926143))
        for detach in (False, True)
    },
    **{
        f"trace_attn_{kind.name}_{act}_detach{int(detach)}": (
            {"trace": trace_of(N.ATTENTION_HEAD, HEAD, 2, act, detach, kind)},
            0.5451268902542935 if act is PRE else 0.1802664432746578,
        )
        for kind, act, detach in (
            (AttentionTraceType.QK, PRE, True),
            (AttentionTraceType.QK, POST, False),
            (AttentionTraceType.Q, PRE, True),
            (AttentionTraceType.K, PRE, True),
            (AttentionTraceType.Q, POST, True),
        )
    },
    **{
        f"{name}/logit_diff": (
            {"objective": LOGIT_DIFF, "autoencoders": golden_autoencoders(name)},
            -0.3034679341804032,
        )
        for name in (
            "sae_mlp_post_act",
            "sae_resid_delta_mlp",
            "sae_resid_delta_attn",
            "sae_mlp_post_act_topk",
        )
    },
    **{
        f"{name}/trace_latent_{act}_detach{int(detach)}": (
            {
                "trace": trace_of(node_type, (14, latent), 2, act, detach),
                "autoencoders": golden_autoencoders(name),
            },
            value,
        )
        for name, node_type, latent, value in (
            ("sae_mlp_post_act", N.MLP_AUTOENCODER_LATENT, 12, 2.742057153854828),
            ("sae_resid_delta_mlp", N.AUTOENCODER_LATENT, 28, 2.1167956450366665),
            ("sae_resid_delta_attn", N.ATTENTION_AUTOENCODER_LATENT, 0, 2.7892068507967016),
        )
        for act, detach in ((PRE, True), (POST, False))
    },
    "multi_sae/logit_diff": (
        {
            "objective": LOGIT_DIFF,
            "autoencoders": golden_autoencoders("sae_mlp_post_act", "sae_resid_delta_attn"),
        },
        -0.3034679341804032,
    ),
}


def in_upstream_form(location: L, pass_type: PassType, tensor: torch.Tensor) -> npt.NDArray[Any]:
    if location in (L.ATTN_QUERY, L.ATTN_KEY):
        tensor = tensor * tensor.shape[-1] ** (-0.25 if pass_type is FORWARD else 0.25)
    return (tensor.transpose(1, 2) if location.is_pair_shaped else tensor).numpy()


def assert_golden(found: LivePass, folder: Path) -> int:
    files = sorted(folder.glob("*.npz"))
    for path in files:
        name, kind = path.stem.split(".")
        location, pass_type = ActivationLocationType[name], PassType(kind.lower())
        with np.load(path) as stored:
            expected = {key.removeprefix("layer_"): stored[key] for key in stored.files}
        mine = {
            str(layer).lower(): in_upstream_form(location, pass_type, tensor)
            for (where, kind_of, layer), tensor in found.values.items()
            if where is location and kind_of is pass_type
        }
        assert mine.keys() == expected.keys(), path
        largest = max(float(np.abs(tensor).max()) for tensor in expected.values())
        for key, tensor in expected.items():
            assert mine[key].dtype == np.float64
            np.testing.assert_allclose(mine[key], tensor, rtol=0, atol=TOLERANCE * largest)
    return len(files)


@pytest.mark.parametrize("run", GOLDEN_RUNS)
def test_passes_equal_the_golden_runs(run: str, golden_model: LoadedModel) -> None:
    arguments, value = GOLDEN_RUNS[run]
    [found] = run_pass(golden_model, [golden_prompts()["p0"]], **arguments)
    assert found.objective_value == pytest.approx(value, rel=TOLERANCE)
    assert assert_golden(found, GOLDEN / "raw" / run / "p0") >= 2


def test_a_ragged_batch_equals_the_golden_runs_of_both_prompts(golden_model: LoadedModel) -> None:
    prompts = golden_prompts()
    found = run_pass(golden_model, list(prompts.values()), objective=LOGIT_DIFF)
    for prompt, one in zip(prompts, found, strict=True):
        assert assert_golden(one, GOLDEN / "raw" / "logit_diff" / prompt) >= 3
