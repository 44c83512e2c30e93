"""Published autoencoders: every layout, written here, read back, computed anew in numpy."""

import json
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import save_file

from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.autoencoder_formats import (
    autoencoder_names,
    load_autoencoder,
    load_autoencoders,
)
from actstore.store.model.autoencoder_functions import ActivationKind, Normalisation
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.model.saelens_format import ARCHITECTURES
from actstore.store.vocabulary import ActivationLocationType

L = ActivationLocationType
Floats = npt.NDArray[Any]
CHANNELS, LATENTS, OUT = 8, 12, 5
ROWS = np.random.default_rng(0).normal(size=(7, CHANNELS)).astype(np.float32)


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def refused(call: Callable[[], object]) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        call()
    return caught.value


def computed(autoencoder: Autoencoder, x: Floats = ROWS) -> tuple[Floats, Floats]:
    given = torch.from_numpy(x)
    latents = autoencoder.encode(given)
    return latents.numpy(), autoencoder.decode(latents, given).numpy()


def assert_computes(
    autoencoder: Autoencoder, latents: npt.NDArray[Any], output: npt.NDArray[Any]
) -> None:
    found = computed(autoencoder)
    np.testing.assert_allclose(found[0], latents, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(found[1], output, rtol=2e-5, atol=1e-5)
    assert np.count_nonzero(latents) > 0


def relu(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    rectified: npt.NDArray[Any] = np.maximum(values, 0)
    return rectified


def greatest(values: npt.NDArray[Any], k: int) -> npt.NDArray[Any]:
    least = np.sort(values, axis=-1)[..., -k][..., None]
    return np.where(values >= least, values, 0)


# SAELens


def weights(**changes: Floats | None) -> dict[str, Floats]:
    tensors: dict[str, Floats | None] = {
        "W_enc": normal(1, CHANNELS, LATENTS),
        "W_dec": normal(2, LATENTS, CHANNELS),
        "b_enc": normal(3, LATENTS),
        "b_dec": normal(4, CHANNELS),
    }
    return {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}


def config(**changes: Any) -> dict[str, Any]:
    """As SAELens 6 writes it."""
    metadata = {
        "sae_lens_version": "6.5.1",
        "hook_name": "blocks.3.hook_resid_post",
        "hook_head_index": None,
        "model_name": "gpt2",
        **changes.pop("metadata", {}),
    }
    return {
        "architecture": "standard",
        "d_in": CHANNELS,
        "d_sae": LATENTS,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
        **changes,
    }


def old_config(**changes: Any) -> dict[str, Any]:
    """As versions up to 5 wrote it."""
    return {
        "architecture": "standard",
        "d_in": CHANNELS,
        "d_sae": LATENTS,
        "activation_fn_str": "relu",
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "hook_name": "blocks.3.hook_resid_post",
        "hook_layer": 3,
        "hook_head_index": None,
        "normalize_activations": "none",
        "sae_lens_training_version": "5.1.0",
        **changes,
    }


def saelens(
    folder: Path, settings: dict[str, Any] | None = None, tensors: dict[str, Floats] | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config() if settings is None else settings))
    save_file(weights() if tensors is None else tensors, folder / "sae_weights.safetensors")
    return folder


@pytest.mark.parametrize("make", [config, old_config])
def test_standard(tmp_path: Path, make: Callable[..., dict[str, Any]]) -> None:
    one = load_autoencoder(saelens(tmp_path / "blocks.3", make()))
    w = weights()
    latents = relu((ROWS - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    assert_computes(one, latents, latents @ w["W_dec"] + w["b_dec"])
    assert (one.location, one.layer, one.name) == (L.RESID_POST_MLP, 3, "blocks.3")
    assert one.has_linear_encoder_and_relu
    assert one.dtype == torch.float32
    assert one.source_format.startswith("saelens")


def test_files_inside_the_folder_may_be_named(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "here")
    expected = load_autoencoder(folder).fingerprint
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert load_autoencoder(str(folder / name)).fingerprint == expected


def test_output_bias_is_not_subtracted_where_the_config_says_so(tmp_path: Path) -> None:
    one = load_autoencoder(saelens(tmp_path / "s", config(apply_b_dec_to_input=False)))
    w = weights()
    latents = relu(ROWS @ w["W_enc"] + w["b_enc"])
    assert_computes(one, latents, latents @ w["W_dec"] + w["b_dec"])


def test_jumprelu(tmp_path: Path) -> None:
    w = weights(threshold=np.abs(normal(5, LATENTS)))
    one = load_autoencoder(saelens(tmp_path / "s", config(architecture="jumprelu"), w))
    pre = (ROWS - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    latents = relu(pre) * (pre > w["threshold"])
    assert_computes(one, latents, latents @ w["W_dec"] + w["b_dec"])
    assert one.activation.kind is ActivationKind.JUMPRELU


@pytest.mark.parametrize("rescaled", [True, False])
def test_topk(tmp_path: Path, rescaled: bool) -> None:
    settings = config(architecture="topk", k=4, rescale_acts_by_decoder_norm=rescaled)
    one = load_autoencoder(saelens(tmp_path / "s", settings))
    w = weights()
    norms = np.linalg.norm(w["W_dec"], axis=1) if rescaled else np.ones(LATENTS)
    latents = relu(greatest(((ROWS - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms, 4))
    assert_computes(one, latents, (latents / norms) @ w["W_dec"] + w["b_dec"])


def test_topk_of_old_configs(tmp_path: Path) -> None:
    kwargs = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    old = load_autoencoder(saelens(tmp_path / "old", old_config(**kwargs)))
    new = load_autoencoder(saelens(tmp_path / "new", config(architecture="topk", k=3)))
    assert old.fingerprint == new.fingerprint
    assert old.activation.settings["k"] == 3


def test_gated(tmp_path: Path) -> None:
    w = weights(
        b_enc=None,
        b_gate=normal(6, LATENTS),
        b_mag=normal(7, LATENTS),
        r_mag=normal(8, LATENTS) * np.float32(0.4),
    )
    one = load_autoencoder(saelens(tmp_path / "s", config(architecture="gated"), w))
    centred = ROWS - w["b_dec"]
    gate = centred @ w["W_enc"] + w["b_gate"] > 0
    latents = gate * relu(centred @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"])
    assert_computes(one, latents, latents @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("jumps", [True, False])
def test_transcoders(tmp_path: Path, skips: bool, jumps: bool) -> None:
    w = weights(
        W_dec=normal(2, LATENTS, OUT),
        b_dec=normal(4, OUT),
        W_skip=normal(9, OUT, CHANNELS) if skips else None,
        threshold=np.abs(normal(5, LATENTS)) if jumps else None,
    )
    architecture = f"{'jumprelu_' * jumps}{'skip_' * skips}transcoder"
    names = {
        "hook_name": "blocks.3.hook_resid_mid",
        "hook_name_out": "blocks.3.hook_mlp_out",
    }
    settings = config(
        architecture=architecture, d_out=OUT, apply_b_dec_to_input=False, metadata=names
    )
    one = load_autoencoder(saelens(tmp_path / "s", settings, w))
    pre = ROWS @ w["W_enc"] + w["b_enc"]
    latents = relu(pre) * (pre > w["threshold"]) if jumps else relu(pre)
    output = latents @ w["W_dec"] + w["b_dec"]
    assert_computes(one, latents, output + ROWS @ w["W_skip"].T if skips else output)
    assert (one.location, one.layer) == (L.RESID_POST_ATTN, 3)
    assert (one.output_location, one.output_layer) == (L.RESID_DELTA_MLP, 3)


def test_layer_norm_uses_the_unbiased_deviation_and_is_undone(tmp_path: Path) -> None:
    one = load_autoencoder(saelens(tmp_path / "s", config(normalize_activations="layer_norm")))
    w = weights()
    mean, deviation = ROWS.mean(1, keepdims=True), ROWS.std(1, ddof=1, keepdims=True)
    x = (ROWS - mean) / (deviation + 1e-5)
    latents = relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    assert_computes(one, latents, (latents @ w["W_dec"] + w["b_dec"]) * deviation + mean)


def test_constant_norm_is_undone(tmp_path: Path) -> None:
    settings = config(normalize_activations="constant_norm_rescale")
    one = load_autoencoder(saelens(tmp_path / "s", settings))
    w = weights()
    factor = np.sqrt(CHANNELS) / np.linalg.norm(ROWS, axis=1, keepdims=True)
    latents = relu((ROWS * factor - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    assert_computes(one, latents, (latents @ w["W_dec"] + w["b_dec"]) / factor)


@pytest.mark.parametrize("stated", [None, False])
def test_old_words_for_no_normalisation(tmp_path: Path, stated: Any) -> None:
    one = load_autoencoder(saelens(tmp_path / "s", old_config(normalize_activations=stated)))
    assert one.normalisation is Normalisation.NONE


@pytest.mark.parametrize("make", [config, old_config])
def test_heads_are_read_as_one_row(tmp_path: Path, make: Callable[..., dict[str, Any]]) -> None:
    settings = make()
    settings.get("metadata", settings)["hook_name"] = "blocks.2.attn.hook_z"
    if "metadata" in settings:
        settings["reshape_activations"] = "hook_z"
    one = load_autoencoder(saelens(tmp_path / "s", settings))
    w = weights()
    latents = relu((ROWS - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    found = computed(one, ROWS.reshape(7, 2, CHANNELS // 2))
    assert found[1].shape == (7, 2, CHANNELS // 2)
    np.testing.assert_allclose(found[0], latents, rtol=2e-5, atol=2e-6)
    expected = latents @ w["W_dec"] + w["b_dec"]
    np.testing.assert_allclose(found[1].reshape(7, -1), expected, rtol=2e-5, atol=1e-5)
    assert one.location is L.ATTN_WEIGHTED_SUM_OF_VALUES


@pytest.mark.parametrize(
    ("hook", "location", "layer"),
    [
        ("blocks.4.hook_resid_pre", L.RESID_POST_MLP, 3),
        ("blocks.0.hook_resid_pre", L.RESID_POST_EMBEDDING, None),
        ("blocks.4.hook_resid_mid", L.RESID_POST_ATTN, 4),
        ("blocks.4.hook_attn_out", L.RESID_DELTA_ATTN, 4),
        ("blocks.4.hook_mlp_out", L.RESID_DELTA_MLP, 4),
        ("blocks.4.mlp.hook_post", L.MLP_POST_ACT, 4),
    ],
)
def test_place_follows_the_hook_name(
    tmp_path: Path, hook: str, location: L, layer: int | None
) -> None:
    new = load_autoencoder(saelens(tmp_path / "n", config(metadata={"hook_name": hook})))
    settings = old_config(hook_point=hook, hook_point_layer=9)
    del settings["hook_name"], settings["hook_layer"]
    old = load_autoencoder(saelens(tmp_path / "o", settings))
    assert (new.location, new.layer) == (old.location, old.layer) == (location, layer)
    assert new.fingerprint == old.fingerprint


def test_settings_of_the_betas(tmp_path: Path) -> None:
    settings = config()
    settings["meta"] = settings.pop("metadata")
    one = load_autoencoder(saelens(tmp_path / "s", settings))
    assert (one.location, one.layer) == (L.RESID_POST_MLP, 3)


def test_given_place_goes_first(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "s")
    assert load_autoencoder(folder, layer=7).layer == 7
    one = load_autoencoder(folder, location="blocks.5.hook_mlp_out")
    assert (one.location, one.layer) == (L.RESID_DELTA_MLP, 5)
    one = load_autoencoder(folder, location=L.RESID_DELTA_MLP)
    assert (one.location, one.layer) == (L.RESID_DELTA_MLP, 3)
    other = saelens(tmp_path / "o", config(metadata={"hook_name": "made.up"}))
    assert load_autoencoder(other, location="mlp_out", layer=1).layer == 1


def test_place_that_is_not_derivable(tmp_path: Path) -> None:
    unknown = saelens(
        tmp_path / "a", config(metadata={"hook_name": "blocks.3.ln2.hook_normalized"})
    )
    error = refused(lambda: load_autoencoder(unknown))
    assert error.kind is ErrorKind.UNKNOWN_LOCATION
    assert "location=" in str(error)
    no_layer = saelens(tmp_path / "b", config(metadata={"hook_name": "hook_resid_post"}))
    error = refused(lambda: load_autoencoder(no_layer))
    assert error.kind is ErrorKind.UNKNOWN_LAYER
    assert "layer=" in str(error)
    assert load_autoencoder(no_layer, layer=2).layer == 2
    given = refused(lambda: load_autoencoder(unknown, location="mlp_out"))
    assert given.kind is ErrorKind.UNKNOWN_LAYER
    transcoder = config(architecture="transcoder", apply_b_dec_to_input=False)
    error = refused(lambda: load_autoencoder(saelens(tmp_path / "c", transcoder)))
    assert "hook_name_out" in str(error)


def test_scaling_factor(tmp_path: Path) -> None:
    ones = saelens(tmp_path / "a", tensors=weights(scaling_factor=np.ones(LATENTS, np.float32)))
    plain = load_autoencoder(saelens(tmp_path / "b"))
    assert load_autoencoder(ones).fingerprint == plain.fingerprint
    factor = np.abs(normal(11, LATENTS))
    unused = saelens(tmp_path / "c", tensors=weights(scaling_factor=factor))
    assert "scaling_factor" in str(refused(lambda: load_autoencoder(unused)))
    used = old_config(finetuning_scaling_factor=True)
    one = load_autoencoder(saelens(tmp_path / "d", used, weights(scaling_factor=factor)))
    w = weights()
    latents = relu((ROWS - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    assert_computes(one, latents, (latents * factor) @ w["W_dec"] + w["b_dec"])
    short = saelens(tmp_path / "e", used, weights(scaling_factor=factor[:3]))
    assert refused(lambda: load_autoencoder(short)).kind is ErrorKind.MALFORMED_FILE


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architecture": "temporal"}, ", ".join(ARCHITECTURES)),
        ({"architecture": "batchtopk"}, "its architecture is 'batchtopk'"),
        ({"activation_fn": "tanh-relu"}, "'tanh-relu'"),
        ({"normalize_activations": "expected_average_only_in"}, "Fold them into its weights"),
        ({"normalize_activations": True}, "Fold them into its weights"),
        ({"normalize_activations": "covariance_whitening"}, "statistics of the training data"),
        ({"normalize_activations": "something"}, "Normalisations that are read: none, layer_norm"),
        ({"metadata": {"hook_head_index": 2}}, "reads head 2 alone"),
        ({"metadata": {"hook_name": "blocks.1.attn.hook_z"}}, "each head"),
        ({"metadata": {"hook_name": "blocks.1.attn.hook_pattern"}}, "attn_qk_probs has axes"),
        ({"architecture": "topk"}, "its k is None"),
        ({"architecture": "topk", "k": 13}, "k is 13"),
        ({"architecture": "topk", "k": "4"}, "its k is '4'"),
        ({"rescale_acts_by_decoder_norm": True}, "topk alone"),
        (
            {"architecture": "transcoder", "metadata": {"hook_name_out": "blocks.1.hook_mlp_out"}},
            "apply_b_dec_to_input",
        ),
    ],
)
def test_unsupported_settings_say_what_is_needed(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    error = refused(lambda: load_autoencoder(saelens(tmp_path / "mine", config(**changes))))
    assert error.kind is ErrorKind.UNSUPPORTED_AUTOENCODER
    assert told in str(error)
    assert "'mine'" in str(error)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_missing_tensors_are_named(tmp_path: Path, architecture: str) -> None:
    needed = {"standard": "b_enc", "jumprelu": "threshold", "gated": "b_gate"}[architecture]
    tensors = weights(b_enc=None) if architecture == "standard" else weights()
    error = refused(
        lambda: load_autoencoder(
            saelens(tmp_path / "s", config(architecture=architecture), tensors)
        )
    )
    assert error.kind is ErrorKind.MALFORMED_FILE
    assert f"lacks the tensor '{needed}'" in str(error)
    assert "W_dec" in str(error) or "b_enc" in str(error)


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"threshold": normal(1, LATENTS)}, ErrorKind.MALFORMED_FILE, "no use for: ['threshold']"),
        ({"W_enc": normal(1, CHANNELS + 1, LATENTS)}, ErrorKind.MALFORMED_FILE, "says d_in 8"),
        ({"W_enc": normal(1, CHANNELS, LATENTS - 1)}, ErrorKind.MALFORMED_FILE, "says d_sae 12"),
        ({"W_enc": normal(1, CHANNELS)}, ErrorKind.MALFORMED_FILE, "of shape (8,)"),
        ({"b_enc": normal(1, 3)}, ErrorKind.UNSUPPORTED_AUTOENCODER, "latent_bias has shape (3,)"),
        (
            {"W_dec": np.full((LATENTS, CHANNELS), np.nan, np.float32)},
            ErrorKind.UNSUPPORTED_AUTOENCODER,
            "96 numbers of its decoder are not finite",
        ),
    ],
)
def test_bad_tensors(
    tmp_path: Path, changes: dict[str, Floats], kind: ErrorKind, told: str
) -> None:
    folder = saelens(tmp_path / "s", tensors=weights(**changes))
    error = refused(lambda: load_autoencoder(folder))
    assert error.kind is kind
    assert told in str(error)


def test_dtypes_are_kept_and_mixed_ones_widened(tmp_path: Path) -> None:
    halves = {name: tensor.astype(np.float16) for name, tensor in weights().items()}
    assert load_autoencoder(saelens(tmp_path / "a", tensors=halves)).dtype == torch.float16
    mixed = halves | {"b_dec": weights()["b_dec"]}
    assert load_autoencoder(saelens(tmp_path / "b", tensors=mixed)).dtype == torch.float32
    whole = {name: tensor.astype(np.int32) for name, tensor in weights().items()}
    error = refused(lambda: load_autoencoder(saelens(tmp_path / "c", tensors=whole)))
    assert "no tensor of floating-point numbers" in str(error)


def test_later_changes_of_the_file_change_nothing(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "s")
    one = load_autoencoder(folder)
    before = one.fingerprint
    file = folder / "sae_weights.safetensors"
    with open(file, "r+b") as opened:
        opened.seek(-64, os.SEEK_END)
        opened.write(bytes(64))
    assert load_autoencoder(folder).fingerprint != before
    again = load_autoencoder(saelens(tmp_path / "s"))
    np.testing.assert_array_equal(one.decoder, again.decoder)


@pytest.mark.parametrize("kept", [0, 5, 100, -4])
def test_truncated_weights(tmp_path: Path, kept: int) -> None:
    folder = saelens(tmp_path / "s")
    file = folder / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    error = refused(lambda: load_autoencoder(folder))
    assert error.kind is ErrorKind.MALFORMED_FILE
    assert str(file) in str(error)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\xff", '{"metadata": 3}'])
def test_malformed_config(tmp_path: Path, text: str) -> None:
    folder = saelens(tmp_path / "s")
    (folder / "cfg.json").write_bytes(text.encode("latin-1"))
    error = refused(lambda: load_autoencoder(folder))
    assert error.kind is ErrorKind.MALFORMED_FILE
    assert "cfg.json" in str(error)


def test_config_of_the_wrong_types(tmp_path: Path) -> None:
    for changes in ({"architecture": 3}, {"metadata": {"hook_name": ["x"]}}):
        error = refused(lambda c=changes: load_autoencoder(saelens(tmp_path / "s", config(**c))))  # type: ignore[misc]
        assert error.kind is ErrorKind.MALFORMED_FILE


def test_missing_files(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "s")
    (folder / "sae_weights.safetensors").unlink()
    assert refused(lambda: load_autoencoder(folder)).kind is ErrorKind.MISSING_FILE
    (folder / "cfg.json").unlink()
    for path in (folder, tmp_path / "nowhere", tmp_path / "nowhere.pt", tmp_path / "x.npz"):
        error = refused(lambda path=path: load_autoencoder(path))  # type: ignore[misc]
        assert error.kind is ErrorKind.MISSING_FILE
        assert "SAELens" in str(error)
        assert "load_autoencoders" in str(error)


# OpenAI


def state(**changes: Any) -> "OrderedDict[str, Any]":
    fields: OrderedDict[str, Any] = OrderedDict(
        {
            "pre_bias": torch.from_numpy(normal(4, CHANNELS)),
            "latent_bias": torch.from_numpy(normal(3, LATENTS)),
            "stats_last_nonzero": torch.zeros(LATENTS, dtype=torch.long),
            "latents_activation_frequency": torch.ones(LATENTS),
            "encoder.weight": torch.from_numpy(normal(1, LATENTS, CHANNELS)),
            "decoder.weight": torch.from_numpy(normal(2, CHANNELS, LATENTS)),
            "activation": "ReLU",
            "activation_state_dict": OrderedDict(),
        }
    )
    fields |= changes
    return OrderedDict((name, value) for name, value in fields.items() if value is not None)


def top(k: Any, **further: Any) -> dict[str, Any]:
    fields = {"k": k, "postact_fn": "ReLU", **further}
    return {
        "activation": "TopK",
        "activation_state_dict": OrderedDict(fields),
        "activation.k": k,
        "activation.postact_fn": fields["postact_fn"],
    }


def openai(file: Path, zipped: bool = True, **changes: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state(**changes), file, _use_new_zipfile_serialization=zipped)
    return file


@pytest.mark.parametrize("zipped", [True, False])
def test_openai_relu_is_not_normalised(tmp_path: Path, zipped: bool) -> None:
    one = load_autoencoder(openai(tmp_path / "3.pt", zipped), location="mlp_post_act", layer=3)
    w = {name: value.numpy() for name, value in state().items() if isinstance(value, torch.Tensor)}
    latents = relu((ROWS - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"])
    assert_computes(one, latents, latents @ w["decoder.weight"].T + w["pre_bias"])
    assert (one.location, one.layer, one.source_format) == (L.MLP_POST_ACT, 3, "openai")


@pytest.mark.parametrize("after", ["ReLU", "Identity"])
def test_openai_topk_is_normalised(tmp_path: Path, after: str) -> None:
    file = openai(tmp_path / "3.pt", **top(9, postact_fn=after))
    one = load_autoencoder(file, location=L.RESID_POST_ATTN, layer=0)
    w = {name: value.numpy() for name, value in state().items() if isinstance(value, torch.Tensor)}
    mean, deviation = ROWS.mean(1, keepdims=True), ROWS.std(1, ddof=1, keepdims=True)
    x = (ROWS - mean) / (deviation + 1e-5) - w["pre_bias"]
    latents = greatest(x @ w["encoder.weight"].T + w["latent_bias"], 9)
    latents = relu(latents) if after == "ReLU" else latents
    output = latents @ w["decoder.weight"].T + w["pre_bias"]
    assert_computes(one, latents, output * deviation + mean)
    assert (latents < 0).any() == (after == "Identity")


def test_openai_identity_and_unnamed_activation(tmp_path: Path) -> None:
    place: dict[str, Any] = {"location": "mlp_out", "layer": 0}
    linear = load_autoencoder(openai(tmp_path / "a.pt", activation="Identity"), **place)
    assert linear.activation.kind is ActivationKind.IDENTITY
    unnamed = openai(tmp_path / "b.pt", activation=None, activation_state_dict=None)
    assert load_autoencoder(unnamed, **place).activation.kind is ActivationKind.RELU


@pytest.mark.parametrize("repeated", [True, False])
def test_openai_tied_decoder(tmp_path: Path, repeated: bool) -> None:
    weight = state()["encoder.weight"]
    changes: dict[str, Any] = {
        "decoder.weight": None,
        "decoder.linear.weight": weight if repeated else None,
    }
    one = load_autoencoder(openai(tmp_path / "0.pt", **changes), location="mlp_out", layer=0)
    torch.testing.assert_close(one.decoder, weight)
    torch.testing.assert_close(one.encoder, weight.T)


def test_openai_place_follows_the_published_path(tmp_path: Path) -> None:
    file = openai(tmp_path / "resid_delta_mlp_v5_32k" / "autoencoders" / "7.pt", **top(2))
    one = load_autoencoder(file)
    assert (one.location, one.layer) == (L.RESID_DELTA_MLP, 7)
    assert one.name == "resid_delta_mlp_v5_32k/autoencoders/7.pt"
    assert load_autoencoder(file, location="attn_out", layer=1).location is L.RESID_DELTA_ATTN
    older = openai(tmp_path / "mlp_post_act" / "autoencoders" / "0.pt")
    assert load_autoencoder(older).location is L.MLP_POST_ACT
    other = openai(tmp_path / "mine" / "autoencoders" / "0.pt")
    assert refused(lambda: load_autoencoder(other)).kind is ErrorKind.UNKNOWN_LOCATION
    assert load_autoencoder(other, location="mlp_out").layer == 0


def test_openai_place_is_needed(tmp_path: Path) -> None:
    file = openai(tmp_path / "3.pt")
    assert refused(lambda: load_autoencoder(file)).kind is ErrorKind.UNKNOWN_LOCATION
    error = refused(lambda: load_autoencoder(file, location="mlp_out"))
    assert error.kind is ErrorKind.UNKNOWN_LAYER


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"activation": "GELU"}, "its activation is 'GELU'"),
        (top(0), "k is 0"),
        (top(13), "k is 13"),
        (top("many"), "its k is 'many'"),
        (top(3, postact_fn="GELU"), "with 'GELU'"),
        ({"activation": "TopK"}, "its k is None"),
        ({"pre_bias": torch.full((CHANNELS,), torch.inf)}, "not finite"),
        ({"latent_bias": torch.zeros(2)}, "latent_bias has shape (2,)"),
    ],
)
def test_openai_unsupported(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    file = openai(tmp_path / "3.pt", **changes)
    error = refused(lambda: load_autoencoder(file, location="mlp_out", layer=0))
    assert error.kind is ErrorKind.UNSUPPORTED_AUTOENCODER
    assert told in str(error)


class Payload:
    """Makes a file when unpickled, if it ever is."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_openai_objects_are_never_run(tmp_path: Path) -> None:
    file = openai(tmp_path / "3.pt", extra=Payload(tmp_path / "trace"))
    error = refused(lambda: load_autoencoder(file, location="mlp_out", layer=0))
    assert error.kind is ErrorKind.MALFORMED_FILE
    assert "never run" in str(error)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("content", ["half", "", "junk", "list", "no tensors", "lacking"])
def test_openai_malformed(tmp_path: Path, content: str) -> None:
    file = openai(tmp_path / "3.pt")
    if content == "half":
        file.write_bytes(file.read_bytes()[:-400])
    elif content in ("", "junk"):
        file.write_bytes(content.encode())
    elif content == "lacking":
        changes: dict[str, Any] = {"encoder.weight": None}
        openai(file, **changes)
    else:
        torch.save([1] if content == "list" else {"k": 3}, file)
    error = refused(lambda: load_autoencoder(file, location="mlp_out", layer=0))
    assert error.kind is ErrorKind.MALFORMED_FILE
    assert "3.pt" in str(error)


# Gemma Scope


def gemma(file: Path, **changes: Any) -> Path:
    tensors = {name.lower(): tensor for name, tensor in weights(threshold=normal(5, 12)).items()}
    fields = {name: value for name, value in (tensors | changes).items() if value is not None}
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **fields)
    return file


def test_gemma_scope(tmp_path: Path) -> None:
    file = gemma(tmp_path / "layer_20" / "width_16k" / "average_l0_71" / "params.npz")
    w = weights()
    pre = ROWS @ w["W_enc"] + w["b_enc"]
    latents = relu(pre) * (pre > normal(5, LATENTS))
    for path in (file, file.parent):
        one = load_autoencoder(path, location="resid_post", layer=20)
        assert_computes(one, latents, latents @ w["W_dec"] + w["b_dec"])
        assert (one.location, one.layer) == (L.RESID_POST_MLP, 20)
        assert one.name == "layer_20/width_16k/average_l0_71"


def test_gemma_scope_says_what_is_missing(tmp_path: Path) -> None:
    file = gemma(tmp_path / "params.npz")
    assert refused(lambda: load_autoencoder(file)).kind is ErrorKind.UNKNOWN_LOCATION
    layerless = refused(lambda: load_autoencoder(file, location="mlp_out"))
    assert layerless.kind is ErrorKind.UNKNOWN_LAYER
    for name in ("w_enc", "w_dec", "b_enc", "b_dec", "threshold"):
        gemma(file, **{name: None})
        error = refused(lambda: load_autoencoder(file, location="mlp_out", layer=0))
        assert error.kind is ErrorKind.MALFORMED_FILE
        assert name.lower() in str(error)


@pytest.mark.parametrize("content", ["half", "", "junk", "objects", "flipped"])
def test_gemma_scope_malformed(tmp_path: Path, content: str) -> None:
    file = gemma(tmp_path / "params.npz")
    whole = file.read_bytes()
    if content == "half":
        file.write_bytes(whole[: len(whole) // 2])
    elif content == "flipped":
        file.write_bytes(whole[:400] + bytes([whole[400] ^ 8]) + whole[401:])
    elif content == "objects":
        objects = np.array([Payload(tmp_path / "trace")], dtype=object)
        np.savez(file, allow_pickle=True, w_enc=objects)
    else:
        file.write_bytes(content.encode())
    error = refused(lambda: load_autoencoder(file, location="mlp_out", layer=0))
    assert error.kind is ErrorKind.MALFORMED_FILE
    assert not (tmp_path / "trace").exists()


# The layout of the reference outputs


def plain(folder: Path, **changes: Any) -> Path:
    entry = {
        "input_dst": "resid_delta_attn",
        "n_latents": LATENTS,
        "activation": "ReLU",
        "files": [f"saes/some.layer{layer}.safetensors" for layer in (0, 2)],
        **changes,
    }
    folder.mkdir(exist_ok=True)
    listing = {"some": entry, "_formula": "in words"}
    (folder / "saes.json").write_text(json.dumps(listing))
    for layer in (0, 2):
        save_file(plain_tensors(layer), folder / f"some.layer{layer}.safetensors")
    return folder


def plain_tensors(layer: int) -> dict[str, Floats]:
    return {
        "pre_bias": normal(layer + 1, CHANNELS),
        "encoder.weight": normal(layer + 2, LATENTS, CHANNELS),
        "latent_bias": normal(layer + 3, LATENTS),
        "decoder.weight": normal(layer + 4, CHANNELS, LATENTS),
    }


@pytest.mark.parametrize("kind", ["ReLU", "TopK"])
def test_plain_layout(tmp_path: Path, kind: str) -> None:
    settings = {"activation": kind} | ({"k": 5, "postact_fn": "ReLU"} if kind == "TopK" else {})
    folder = plain(tmp_path / "saes", **settings)
    assert autoencoder_names(folder) == autoencoder_names(folder / "saes.json") == ["some"]
    loaded = load_autoencoders(folder, "some")
    assert [(one.location, one.layer) for one in loaded] == [
        (L.RESID_DELTA_ATTN, 0),
        (L.RESID_DELTA_ATTN, 2),
    ]
    for one, layer in zip(loaded, (0, 2), strict=True):
        w = plain_tensors(layer)
        pre = (ROWS - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
        latents = relu(greatest(pre, 5) if kind == "TopK" else pre)
        assert_computes(one, latents, latents @ w["decoder.weight"].T + w["pre_bias"])
        assert one.name == f"some.layer{layer}"


def test_plain_layout_is_refused_where_it_is_wrong(tmp_path: Path) -> None:
    folder = plain(tmp_path / "saes")
    for name in ("other", "_formula"):
        error = refused(lambda name=name: load_autoencoders(folder, name))  # type: ignore[misc]
        assert error.kind is ErrorKind.INVALID_ARGUMENT
        assert "Names: some" in str(error)
    assert refused(lambda: load_autoencoder(folder)).kind is ErrorKind.MISSING_FILE
    wrong: list[tuple[dict[str, Any], ErrorKind]] = [
        ({"files": ["some.safetensors"]}, ErrorKind.MALFORMED_FILE),
        ({"files": ["some.layer1.safetensors"]}, ErrorKind.MISSING_FILE),
        ({"files": None}, ErrorKind.MALFORMED_FILE),
        ({"activation": "TopK"}, ErrorKind.UNSUPPORTED_AUTOENCODER),
        ({"input_dst": "nowhere"}, ErrorKind.UNKNOWN_LOCATION),
    ]
    for changes, kind in wrong:
        plain(folder, **changes)
        assert refused(lambda: load_autoencoders(folder, "some")).kind is kind
    (folder / "saes.json").write_text(json.dumps({"some": [1]}))
    assert refused(lambda: load_autoencoders(folder, "some")).kind is ErrorKind.MALFORMED_FILE
    (folder / "saes.json").unlink()
    assert refused(lambda: load_autoencoders(folder, "some")).kind is ErrorKind.MISSING_FILE
