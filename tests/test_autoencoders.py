"""Autoencoders: what they compute, how it differentiates, and how they are kept together."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.store.errors import ActstoreError, ErrorKind, InvalidInput, StoreDamaged, Unavailable
from actstore.store.model.autoencoder_families import AutoencoderFamily, Autoencoders
from actstore.store.model.autoencoder_files import read_autoencoder, write_autoencoder
from actstore.store.model.autoencoder_functions import (
    Activation,
    Gated,
    Identity,
    JumpReLU,
    Normalisation,
    ReLU,
    TopK,
)
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.vocabulary import ActivationLocationType, NodeType

L = ActivationLocationType
Floats = npt.NDArray[np.float64]
CHANNELS, LATENTS = 6, 9


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(**changes: Any) -> Autoencoder:
    fields: dict[str, Any] = {
        "name": "one",
        "location": L.RESID_POST_MLP,
        "layer": 1,
        "encoder": random(1, CHANNELS, LATENTS),
        "decoder": random(2, LATENTS, CHANNELS),
        "latent_bias": random(3, LATENTS),
        "input_bias": random(4, CHANNELS),
        "output_bias": random(5, CHANNELS),
        "activation": ReLU(),
    }
    return Autoencoder(**fields | changes)


def gated() -> Gated:
    return Gated(random(6, LATENTS), random(7, LATENTS) * 0.3, random(8, LATENTS))


def activations() -> dict[str, Activation]:
    return {
        "relu": ReLU(),
        "identity": Identity(),
        "jumprelu": JumpReLU(random(9, LATENTS).abs() * 0.4),
        "topk": TopK(3),
        "topk_identity": TopK(3, rectified=False),
        "gated": gated(),
    }


def variants() -> dict[str, Autoencoder]:
    into_mlp = (L.RESID_DELTA_MLP, 1)
    by_activation = {name: made(activation=value) for name, value in activations().items()}
    return by_activation | {
        "layer_norm": made(normalisation=Normalisation.LAYER_NORM, activation=TopK(3)),
        "constant_norm": made(normalisation=Normalisation.CONSTANT_NORM_RESCALE),
        "rescaled": made(rescale_acts_by_decoder_norm=True, activation=TopK(3)),
        "heads": made(location=L.ATTN_WEIGHTED_SUM_OF_VALUES),
        "transcoder": made(
            writes_to=into_mlp, decoder=random(2, LATENTS, 4), output_bias=random(5, 4)
        ),
        "skip": made(writes_to=into_mlp, skip=random(10, CHANNELS, CHANNELS)),
        "normalised_transcoder": made(writes_to=into_mlp, normalisation=Normalisation.LAYER_NORM),
        "embedding": made(location=L.RESID_POST_EMBEDDING, layer=None),
    }


def shape_of(autoencoder: Autoencoder) -> tuple[int, ...]:
    return (2, 3) if autoencoder.location is L.ATTN_WEIGHTED_SUM_OF_VALUES else (CHANNELS,)


def raised(call: Callable[[], object]) -> ActstoreError:
    with pytest.raises(ActstoreError) as caught:
        call()
    return caught.value


# What it computes, against formulas written out for one token


def token_latents(autoencoder: Autoencoder, x: Floats) -> Any:
    w, norms = autoencoder.encoder.numpy(), np.sqrt((autoencoder.decoder.numpy() ** 2).sum(1))
    if autoencoder.normalisation is Normalisation.LAYER_NORM:
        x = (x - x.mean()) / (x.std(ddof=1) + 1e-5)
    elif autoencoder.normalisation is Normalisation.CONSTANT_NORM_RESCALE:
        x = x * np.sqrt(len(x)) / np.sqrt((x**2).sum())
    pre = (x - autoencoder.input_bias.numpy()) @ w + autoencoder.latent_bias.numpy()
    if autoencoder.rescale_acts_by_decoder_norm:
        pre = pre * norms
    activation = autoencoder.activation
    if isinstance(activation, Gated):
        gate = pre + activation.gate_bias.numpy() > 0
        magnitude = pre * np.exp(activation.log_scale.numpy()) + activation.magnitude_bias.numpy()
        return np.where(gate, np.maximum(magnitude, 0), 0)
    if isinstance(activation, JumpReLU):
        return np.where(pre > activation.threshold.numpy(), np.maximum(pre, 0), 0)
    if isinstance(activation, TopK):
        latents = np.zeros_like(pre)
        for place in np.argsort(-pre, kind="stable")[: activation.k]:
            latents[place] = max(pre[place], 0) if activation.rectified else pre[place]
        return latents
    return pre if isinstance(activation, Identity) else np.maximum(pre, 0)


def token_output(autoencoder: Autoencoder, latents: Floats, x: Floats) -> Floats:
    decoder = autoencoder.decoder.numpy()
    if autoencoder.rescale_acts_by_decoder_norm:
        decoder = decoder / np.sqrt((decoder**2).sum(1))[:, None]
    output = sum(latents[n] * decoder[n] for n in range(LATENTS)) + autoencoder.output_bias.numpy()
    if not autoencoder.is_transcoder:
        if autoencoder.normalisation is Normalisation.LAYER_NORM:
            output = output * x.std(ddof=1) + x.mean()
        elif autoencoder.normalisation is Normalisation.CONSTANT_NORM_RESCALE:
            output = output * np.sqrt((x**2).sum()) / np.sqrt(len(x))
    if autoencoder.skip is not None:
        output = output + x @ autoencoder.skip.numpy()
    return np.asarray(output)


@pytest.mark.parametrize("name", variants())
def test_latents_and_output_are_those_of_the_formulas(name: str) -> None:
    autoencoder = variants()[name]
    x = random(20, 4, 5, *shape_of(autoencoder))
    latents = autoencoder.encode(x)
    assert latents.shape == (4, 5, LATENTS)
    torch.testing.assert_close(
        autoencoder.activate(autoencoder.encode_pre_act(x)), latents, rtol=0, atol=0
    )
    output = autoencoder.decode(latents, x)
    rows = x.reshape(20, CHANNELS).numpy()
    expected = np.stack([token_latents(autoencoder, row) for row in rows])
    np.testing.assert_allclose(latents.reshape(20, LATENTS), expected, rtol=1e-12, atol=1e-13)
    assert np.count_nonzero(expected) > 0
    outputs = np.stack(
        [token_output(autoencoder, *pair) for pair in zip(expected, rows, strict=True)]
    )
    np.testing.assert_allclose(output.reshape(20, -1), outputs, rtol=1e-11, atol=1e-12)
    assert output.shape[:-1] == x.shape[:-1]


@pytest.mark.parametrize("name", variants())
def test_rows_and_scale_say_what_a_latent_adds(name: str) -> None:
    autoencoder = variants()[name]
    x = random(21, 3, *shape_of(autoencoder))
    latents = autoencoder.encode(x)
    more = latents.clone()
    more[:, 4] += 2.0
    added = autoencoder.decode(more, x) - autoencoder.decode(latents, x)
    expected = 2.0 * autoencoder.latents_decoder_rows[4] * autoencoder.output_scale(x)
    torch.testing.assert_close(added.reshape(3, -1), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in variants() if "norm" not in name])
def test_encoder_rows_are_the_gradients_of_the_values_before_the_activation(name: str) -> None:
    autoencoder = variants()[name]
    x = random(22, *shape_of(autoencoder)).requires_grad_()
    (gradient,) = torch.autograd.grad(autoencoder.encode_pre_act(x)[5], x)
    torch.testing.assert_close(gradient.reshape(-1), autoencoder.latents_encoder_rows[5])


def test_linear_encoder_with_relu_is_recognised() -> None:
    linear = {name for name, one in variants().items() if one.has_linear_encoder_and_relu}
    assert linear == {"relu", "heads", "transcoder", "skip", "embedding"}


# Differentiation


# torch's own forward mode loads functions that its newest version warns of.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", variants())
def test_gradients_in_both_modes(name: str) -> None:
    autoencoder = variants()[name]
    x = random(23, 2, *shape_of(autoencoder)).requires_grad_()

    def reconstruct(given: torch.Tensor) -> torch.Tensor:
        return autoencoder.decode(autoencoder.encode(given), given)

    assert torch.autograd.gradcheck(autoencoder.encode_pre_act, x, check_forward_ad=True)
    assert torch.autograd.gradcheck(autoencoder.encode, x, check_forward_ad=True)
    assert torch.autograd.gradcheck(reconstruct, x, check_forward_ad=True)


@pytest.mark.parametrize("name", ["layer_norm", "constant_norm"])
def test_row_of_zeros_has_finite_latents_and_gradients(name: str) -> None:
    autoencoder = variants()[name]
    x = torch.zeros(2, CHANNELS, dtype=torch.float64, requires_grad=True)
    output = autoencoder.decode(autoencoder.encode(x), x)
    output.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert output.isfinite().all()
    assert x.grad.isfinite().all()


def test_tensors_never_want_a_gradient() -> None:
    autoencoder = made(encoder=random(1, CHANNELS, LATENTS).requires_grad_(), activation=gated())
    assert not any(tensor.requires_grad for tensor in autoencoder.tensors.values())
    x = random(24, 3, CHANNELS)
    assert not autoencoder.decode(autoencoder.encode(x), x).requires_grad


def test_copy_made_without_gradients_takes_part_in_a_backward_pass() -> None:
    autoencoder = made()
    with torch.inference_mode():
        autoencoder.to(torch.float32)
    x = random(25, 2, CHANNELS).float().requires_grad_()
    autoencoder.to(torch.float32).encode(x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None


# Activations at their edges


@given(
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=12),
    st.integers(1, 12),
    st.booleans(),
)
def test_topk_keeps_exactly_k_and_the_lower_latents_among_equals(
    values: list[float], k: int, rectified: bool
) -> None:
    k = min(k, len(values))
    rows = [values, [value + 0.01 * place for place, value in enumerate(values)]]
    expected = []
    for row in rows:
        kept = sorted(range(len(row)), key=lambda place: (-row[place], place))[:k]
        given = [max(value, 0.0) if rectified else value for value in row]
        expected.append([given[place] if place in kept else 0.0 for place in range(len(row))])
    for together in (slice(None), slice(1), slice(1, None)):
        latents = TopK(k, rectified)(torch.tensor(rows[together], dtype=torch.float64))
        assert latents.tolist() == expected[together]


def test_gradient_reaches_only_the_kept_ones_among_equals() -> None:
    pre = torch.tensor([1.0, 2.0, 1.0, 1.0], requires_grad=True)
    TopK(2)(pre).sum().backward()  # type: ignore[no-untyped-call]
    assert pre.grad is not None
    assert pre.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_jumprelu_threshold_is_strict() -> None:
    threshold = torch.tensor([0.5, 0.5, 0.5, 0.0, -1.0, -1.0])
    pre = torch.tensor([0.5, np.nextafter(np.float32(0.5), np.float32(1)), 0.4, 0.0, -0.5, 0.25])
    latents = JumpReLU(threshold)(pre)
    assert latents.tolist() == [0.0, pre[1].item(), 0.0, 0.0, 0.0, 0.25]


def test_gate_is_strict_and_decides_alone() -> None:
    gate = Gated(torch.tensor([-1.0, -0.5, -0.5]), torch.zeros(3), torch.tensor([0.0, 2.0, -9.0]))
    assert gate(torch.tensor([1.0, 1.0, 1.0])).tolist() == [0.0, 3.0, 0.0]


@pytest.mark.parametrize("name", activations())
def test_nan_is_passed_on(name: str) -> None:
    pre = random(26, LATENTS)
    pre[3] = torch.nan
    assert activations()[name](pre)[3].isnan()


# Validation


NAN = torch.full((LATENTS,), torch.nan, dtype=torch.float64)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"encoder": torch.zeros(3, dtype=torch.float64)}, "encoder has shape (3,)"),
        ({"decoder": torch.zeros((), dtype=torch.float64)}, "decoder has shape ()"),
        ({"decoder": random(2, LATENTS + 1, CHANNELS)}, "decoder has shape (10, 6)"),
        ({"decoder": random(2, LATENTS, 4), "output_bias": random(5, 4)}, "reads 6 channels"),
        ({"latent_bias": random(3, LATENTS - 1)}, "latent_bias has shape (8,)"),
        ({"input_bias": random(3, 1)}, "input_bias has shape (1,)"),
        ({"output_bias": random(3, 1)}, "output_bias has shape (1,)"),
        ({"skip": random(3, CHANNELS, 5)}, "skip has shape (6, 5)"),
        ({"latent_bias": NAN}, "9 numbers of its latent_bias are not finite"),
        ({"activation": JumpReLU(NAN)}, "9 numbers of its activation.threshold"),
        ({"activation": JumpReLU(random(1, 2))}, "activation.threshold has shape (2,)"),
        ({"latent_bias": random(3, LATENTS).float()}, "torch.float32 on cpu"),
        ({"activation": TopK(0)}, "k is 0"),
        ({"activation": TopK(LATENTS + 1)}, "k is 10"),
        ({"activation": TopK(True)}, "k is True"),
        ({"location": L.ATTN_QK_PROBS}, "attn_qk_probs has axes"),
        ({"location": L.LOGITS, "layer": None}, "logits has axes vocabulary"),
        ({"writes_to": (L.ATTN_WEIGHTED_SUM_OF_VALUES, 1)}, "are not supported"),
    ],
)
def test_what_cannot_be_used_is_refused(changes: dict[str, Any], told: str) -> None:
    error = raised(lambda: made(**changes))
    assert isinstance(error, InvalidInput)
    assert error.kind is ErrorKind.UNSUPPORTED_AUTOENCODER
    assert told in str(error)
    assert "'one'" in str(error)


def test_whole_numbers_and_one_normalised_channel_are_refused() -> None:
    zeros = {
        "encoder": torch.zeros(1, 2),
        "decoder": torch.zeros(2, 1),
        "latent_bias": torch.zeros(2),
        "input_bias": torch.zeros(1),
        "output_bias": torch.zeros(1),
    }
    assert made(**zeros).n_latents == 2
    error = raised(lambda: made(**zeros, normalisation=Normalisation.LAYER_NORM))
    assert "standard deviation" in str(error)
    whole = {name: tensor.to(torch.int64) for name, tensor in zeros.items()}
    assert "torch.int64" in str(raised(lambda: made(**whole)))


@pytest.mark.parametrize("layer", [None, -1, True, 1.0])
def test_layer_must_be_one(layer: Any) -> None:
    assert raised(lambda: made(layer=layer)).kind is ErrorKind.UNKNOWN_LAYER


def test_location_without_layers_has_none() -> None:
    error = raised(lambda: made(location=L.RESID_POST_EMBEDDING, layer=0))
    assert error.kind is ErrorKind.UNKNOWN_LAYER


def test_values_of_another_shape_or_dtype_are_refused() -> None:
    autoencoder, heads = made(), variants()["heads"]
    for call in (
        lambda: autoencoder.encode(random(1, 2, CHANNELS + 1)),
        lambda: autoencoder.encode(random(1, 2, CHANNELS).float()),
        lambda: autoencoder.encode(torch.tensor(1.0, dtype=torch.float64)),
        lambda: autoencoder.decode(random(1, 2, LATENTS).float()),
        lambda: autoencoder.decode(random(1, 2, CHANNELS)),
        lambda: heads.encode(random(1, 4, CHANNELS)),
        lambda: heads.encode(random(1, CHANNELS)),
    ):
        error = raised(call)
        assert error.kind is ErrorKind.INVALID_ARGUMENT
        assert ".to()" in str(error)


@pytest.mark.parametrize("name", variants())
def test_decoding_without_its_input_is_refused_only_where_it_is_needed(name: str) -> None:
    autoencoder = variants()[name]
    latents = random(27, 2, LATENTS)
    needs = name in ("layer_norm", "constant_norm", "heads", "skip")
    assert autoencoder.decoding_needs_input == needs
    if needs:
        assert "Pass x=" in str(raised(lambda: autoencoder.decode(latents)))
    else:
        assert autoencoder.decode(latents).shape == (2, autoencoder.channel_out)


# Copies and identity


def test_copies_keep_the_fingerprint_while_they_keep_the_values() -> None:
    single = made().to(torch.float32)
    assert single.dtype == torch.float32
    assert single.to(torch.float64).fingerprint == single.fingerprint
    assert single.fingerprint != made().fingerprint
    assert single.to(torch.float64).to(torch.float32).fingerprint == single.fingerprint


def test_same_copy_is_given_again() -> None:
    autoencoder = made()
    assert autoencoder.to() is autoencoder
    assert autoencoder.to(torch.float64, "cpu") is autoencoder
    assert autoencoder.to(torch.float32) is autoencoder.to(torch.float32, "cpu")


def test_copy_in_a_dtype_that_cannot_hold_the_values_is_refused() -> None:
    large = made(output_bias=random(5, CHANNELS) * 1e6)
    assert "not finite" in str(raised(lambda: large.to(torch.float16)))


def test_fingerprint_is_of_all_that_matters_and_of_nothing_else() -> None:
    variety = [one.fingerprint for one in variants().values()]
    variety += [made(layer=2).fingerprint, made(location=L.RESID_DELTA_MLP).fingerprint]
    variety += [made(activation=TopK(4)).fingerprint, made(latent_bias=random(30, 9)).fingerprint]
    assert len(set(variety)) == len(variety)
    assert made(name="other", source_format="x").fingerprint == made().fingerprint
    assert made().fingerprint == made().fingerprint
    assert len(made().fingerprint) == 64


def test_autoencoder_travels_between_processes() -> None:
    autoencoder = made(activation=gated())
    autoencoder.to(torch.float32)
    there = pickle.loads(pickle.dumps(autoencoder))
    assert there.fingerprint == autoencoder.fingerprint
    assert there.to(torch.float32).dtype == torch.float32


# Kept inside a store


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(variants())),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.text(max_size=12),
)
def test_round_trip_is_exact(name: str, dtype: torch.dtype, label: str) -> None:
    autoencoder = replace(variants()[name].to(dtype), name=label, source_format="here")
    data, fields = write_autoencoder(autoencoder)
    back = read_autoencoder(data, fields)
    assert back.settings == autoencoder.settings
    assert (back.name, back.source_format) == (label, "here")
    assert back.fingerprint == autoencoder.fingerprint
    assert back.tensors.keys() == autoencoder.tensors.keys()
    for key, tensor in autoencoder.tensors.items():
        assert back.tensors[key].dtype == dtype
        assert torch.equal(
            back.tensors[key].view(torch.uint8), tensor.contiguous().view(torch.uint8)
        )
    again, same = write_autoencoder(back)
    assert again == data
    assert same == fields


def test_tied_tensors_are_kept_too() -> None:
    weights = random(40, LATENTS, CHANNELS)
    bias = random(41, CHANNELS)
    tied = made(encoder=weights.T, decoder=weights, input_bias=bias, output_bias=bias)
    assert read_autoencoder(*write_autoencoder(tied)).fingerprint == tied.fingerprint


@settings(max_examples=150)
@given(st.data())
def test_flipped_bit_is_found(data: st.DataObject) -> None:
    content, fields = write_autoencoder(made(activation=TopK(2)))
    position = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(StoreDamaged) as caught:
        read_autoencoder(bytes(flipped), fields)
    assert caught.value.kind in (ErrorKind.MALFORMED_FILE, ErrorKind.CHECKSUM_MISMATCH)


@pytest.mark.parametrize(
    "change",
    [
        {"layer": 3},
        {"activation": {"kind": "topk", "k": 3, "rectified": True}},
        {"activation": {"kind": "none"}},
        {"activation": {"kind": "topk"}},
        {"activation": None},
        {"location": "nowhere"},
        {"location": "resid_delta_mlp"},
        {"normalisation": "layer_norm"},
        {"fingerprint": "0" * 64},
    ],
)
def test_changed_settings_are_found(change: dict[str, Any]) -> None:
    content, fields = write_autoencoder(made(activation=TopK(2)))
    assert isinstance(raised(lambda: read_autoencoder(content, fields | change)), StoreDamaged)


def test_settings_of_a_newer_format_and_missing_ones() -> None:
    content, fields = write_autoencoder(made())
    newer = raised(lambda: read_autoencoder(content, fields | {"format": 2}))
    assert newer.kind is ErrorKind.NEWER_FORMAT
    del fields["layer"]
    assert raised(lambda: read_autoencoder(content, fields)).kind is ErrorKind.MALFORMED_FILE
    assert raised(lambda: read_autoencoder(b"", fields)).kind is ErrorKind.MALFORMED_FILE


# Families


@pytest.mark.parametrize(
    ("location", "node_type"),
    [
        (L.MLP_POST_ACT, NodeType.MLP_AUTOENCODER_LATENT),
        (L.RESID_DELTA_MLP, NodeType.MLP_AUTOENCODER_LATENT),
        (L.RESID_DELTA_ATTN, NodeType.ATTENTION_AUTOENCODER_LATENT),
        (L.RESID_POST_ATTN, NodeType.AUTOENCODER_LATENT),
        (L.RESID_POST_MLP, NodeType.AUTOENCODER_LATENT),
    ],
)
def test_node_type_follows_the_input(location: L, node_type: NodeType) -> None:
    assert made(location=location).node_type is node_type
    assert AutoencoderFamily((made(location=location),)).node_type is node_type


def narrow(**changes: Any) -> Autoencoder:
    fields = {
        "encoder": random(50, CHANNELS, 4),
        "decoder": random(51, 4, CHANNELS),
        "latent_bias": random(52, 4),
    }
    return made(**fields | changes)


def test_family_is_ordered_by_layer_and_may_vary_in_width() -> None:
    family = AutoencoderFamily((made(layer=3), narrow(layer=0)))
    assert family.layers == (0, 3)
    assert [family.n_latents(layer) for layer in family.layers] == [4, LATENTS]
    assert [one.layer for one in family] == [0, 3]
    assert len(family) == 2
    error = raised(lambda: family.at_layer(2))
    assert error.kind is ErrorKind.UNKNOWN_LAYER
    assert "layers 0, 3" in str(error)


def test_family_is_of_one_place() -> None:
    assert "none" in str(raised(lambda: AutoencoderFamily(())))
    two = (made(), made(location=L.MLP_POST_ACT, layer=2))
    assert "mlp_post_act to mlp_post_act" in str(raised(lambda: AutoencoderFamily(two)))
    other_output = (made(), made(layer=2, writes_to=(L.RESID_DELTA_MLP, 2)))
    assert "resid_post_mlp to resid_delta_mlp" in str(
        raised(lambda: AutoencoderFamily(other_output))
    )


def test_only_family_answers_to_the_generic_type() -> None:
    mlp = [made(location=L.MLP_POST_ACT, layer=layer) for layer in (1, 0)]
    autoencoders = Autoencoders(iter(mlp))
    family = autoencoders.of(NodeType.AUTOENCODER_LATENT)
    assert family is autoencoders.of(NodeType.MLP_AUTOENCODER_LATENT)
    assert family is autoencoders.at(L.MLP_POST_ACT)
    assert family.layers == (0, 1)
    assert len(autoencoders) == 2


def test_both_kinds_at_once() -> None:
    mlp, attention = made(location=L.RESID_DELTA_MLP), made(location=L.RESID_DELTA_ATTN)
    autoencoders = Autoencoders([mlp, attention])
    assert list(autoencoders.of(NodeType.MLP_AUTOENCODER_LATENT)) == [mlp]
    assert list(autoencoders.of(NodeType.ATTENTION_AUTOENCODER_LATENT)) == [attention]
    assert set(autoencoders) == {mlp, attention}
    error = raised(lambda: autoencoders.of(NodeType.AUTOENCODER_LATENT))
    assert isinstance(error, InvalidInput)
    assert "mlp_autoencoder_latent of resid_delta_mlp at layers 1" in str(error)
    assert "attention_autoencoder_latent of resid_delta_attn" in str(error)


def test_generic_family_beside_another_is_found_by_its_location() -> None:
    stream = made(location=L.RESID_POST_MLP)
    autoencoders = Autoencoders([stream, made(location=L.MLP_POST_ACT)])
    assert isinstance(raised(lambda: autoencoders.of(NodeType.AUTOENCODER_LATENT)), InvalidInput)
    assert list(autoencoders.at(L.RESID_POST_MLP)) == [stream]


def test_two_for_one_place_or_one_node_type_are_refused() -> None:
    twins = [made(name="a"), made(name="b")]
    error = raised(lambda: Autoencoders(twins))
    assert isinstance(error, InvalidInput)
    assert "'a' and 'b' are both of resid_post_mlp at layer 1" in str(error)
    rivals = [made(name="a", location=L.MLP_POST_ACT), made(name="b", location=L.RESID_DELTA_MLP)]
    error = raised(lambda: Autoencoders(rivals))
    assert "mlp_post_act ('a') and of resid_delta_mlp ('b')" in str(error)
    assert "mlp_autoencoder_latent" in str(error)


def test_what_is_not_there_is_said() -> None:
    none = Autoencoders()
    assert len(none) == 0
    for call in (
        lambda: none.of(NodeType.AUTOENCODER_LATENT),
        lambda: none.of(NodeType.MLP_AUTOENCODER_LATENT),
        lambda: none.at(L.MLP_POST_ACT),
    ):
        error = raised(call)
        assert isinstance(error, Unavailable)
        assert "there are: none" in str(error)
    one = Autoencoders([made()])
    assert "resid_post_mlp" in str(raised(lambda: one.of(NodeType.MLP_AUTOENCODER_LATENT)))
    assert raised(lambda: one.of(NodeType.MLP_NEURON)).kind is ErrorKind.INVALID_ARGUMENT
