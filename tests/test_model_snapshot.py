"""What a store keeps of a model: the files, their checks, and what is read from them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_gpt2 import tiny_gpt2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from actstore.ingest import model as model_module
from actstore.ingest.model import LoadedModel, load_model
from actstore.ingest.parameters import encode_parameters
from actstore.ingest.snapshot import snapshot_files
from actstore.store.blobs import LocalBlobs
from actstore.store.errors import ErrorKind, InvalidInput, StoreDamaged, Unavailable
from actstore.store.model import readout as readout_module
from actstore.store.model.architecture import Heads, WeightSource
from actstore.store.model.parameters import Parameter, ParameterFile
from actstore.store.model.pieces import VocabularyPiece, decode_vocabulary, vocabulary_pieces
from actstore.store.model.readout import compute_readout, read_readout
from actstore.store.model.weights import (
    PARAMETERS_KEY,
    SNAPSHOT_KEY,
    ModelSnapshot,
    ModelWeights,
    open_model,
)
from actstore.store.vocabulary import ActivationLocationType, WeightLocationType

W = WeightLocationType
L = ActivationLocationType
TEXT = [
    "def load(path):\n    return open(path)\n",
    "naïve 日本語 🙂 text — “quoted”\n",
    "x = 1 + 22\n",
]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    backend.add_tokens(["two words", "naïve"])
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<|endoftext|>"
    )
    return tokenizer


def write(loaded: LoadedModel, root: Path) -> Path:
    blobs = LocalBlobs(root)
    for key, parts in snapshot_files(loaded).items():
        assert blobs.publish(key, parts)
    return root


def stored_keys(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def expected_weights(model: GPT2LMHeadModel, layer: int) -> dict[W, torch.Tensor]:
    """The weights by hand, from the modules rather than from the table."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    block = f"transformer.h.{layer}."
    heads = model.config.n_head
    fused = state[block + "attn.c_attn.weight"].chunk(3, dim=1)
    query, key, value = (
        torch.stack(one.chunk(heads, dim=1)) for one in fused
    )  # (channel, head * head_channel) -> (head, channel, head_channel)
    return {
        W.EMBEDDING: state["transformer.wte.weight"],
        W.UNEMBEDDING: state["lm_head.weight"].T,
        W.POSITION_EMBEDDING: state["transformer.wpe.weight"],
        W.ATTN_TO_QUERY: query,
        W.ATTN_TO_KEY: key,
        W.ATTN_TO_VALUE: value,
        W.ATTN_TO_RESIDUAL: torch.stack(state[block + "attn.c_proj.weight"].chunk(heads)),
        W.ATTN_OUTPUT_BIAS: state[block + "attn.c_proj.bias"],
        W.MLP_TO_HIDDEN: state[block + "mlp.c_fc.weight"],
        W.MLP_HIDDEN_BIAS: state[block + "mlp.c_fc.bias"],
        W.MLP_TO_RESIDUAL: state[block + "mlp.c_proj.weight"],
        W.MLP_OUTPUT_BIAS: state[block + "mlp.c_proj.bias"],
        W.LAYER_NORM_GAIN_PRE_ATTN: state[block + "ln_1.weight"],
        W.LAYER_NORM_BIAS_PRE_ATTN: state[block + "ln_1.bias"],
        W.LAYER_NORM_GAIN_PRE_MLP: state[block + "ln_2.weight"],
        W.LAYER_NORM_BIAS_PRE_MLP: state[block + "ln_2.bias"],
        W.LAYER_NORM_GAIN_FINAL: state["transformer.ln_f.weight"],
        W.LAYER_NORM_BIAS_FINAL: state["transformer.ln_f.bias"],
    }


# --- weights there and back ---------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_weight_comes_back_exactly(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    model = tiny_gpt2(dtype=dtype, tie_word_embeddings=tied)
    root = write(load_model((model, None)), tmp_path)
    weights = open_model(root)
    for layer in range(2):
        for location, expected in expected_weights(model, layer).items():
            place = layer if location.has_layers else None
            found = weights.weight(location, place)
            assert found.dtype == np.float64
            assert found.flags.c_contiguous
            assert found.shape == weights.dimensions.weight_shape(location)
            assert np.array_equal(found, expected.numpy()), location
            narrow = weights.weight(location, place, dtype="float32")
            assert narrow.dtype == np.float32
            assert np.array_equal(narrow, expected.float().numpy())
        bias = model.state_dict()[f"transformer.h.{layer}.attn.c_attn.bias"].double()
        for part, biased in enumerate((L.ATTN_QUERY, L.ATTN_KEY, L.ATTN_VALUE)):
            found = weights.attention_bias(biased, layer)
            assert np.array_equal(found, bias.chunk(3)[part].reshape(2, 8).numpy())


@pytest.mark.parametrize("tied", [True, False])
def test_the_snapshot_loads_in_transformers_as_the_model_that_ran(
    tmp_path: Path, tied: bool
) -> None:
    model = tiny_gpt2(tie_word_embeddings=tied)
    tokenizer = byte_level_tokenizer()
    loaded = load_model((model, tokenizer))
    root = write(loaded, tmp_path)
    again = load_model(root / "model")
    assert again.fingerprint == loaded.fingerprint
    assert again.dimensions == loaded.dimensions
    assert again.tokenizer is not None
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()
    batch = torch.arange(20).reshape(2, 10)
    with torch.inference_mode():
        assert torch.equal(again.model(batch).logits, model(batch).logits)
    names = set(load_file(root / PARAMETERS_KEY))
    assert names == set(model.state_dict()) - ({"lm_head.weight"} if tied else set())


def test_tensors_are_aligned_whatever_their_dtypes(tmp_path: Path) -> None:
    state = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(5, 3, dtype=torch.float64),
        "c": torch.randn(7),
        "d": torch.tensor([True, False, True]),
        "e": torch.randn(2, 2).bfloat16(),
        "f": torch.tensor(3),
        "g": torch.randn(0, 4),
    }
    encoded, _ = encode_parameters(state)
    path = tmp_path / "parameters"
    path.write_bytes(b"".join(encoded))
    assert path.stat().st_size == encoded.size
    opened = ParameterFile(path, "parameters")
    for name, tensor in load_file(path).items():
        expected = state[name].float() if name == "e" else state[name]
        assert torch.equal(tensor, state[name])
        for source in (opened, encoded):
            assert name in source
            assert np.array_equal(source.array(name), expected.numpy())
    header_length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + header_length])
    for name, entry in header.items():
        if name != "__metadata__":
            assert (8 + header_length + entry["data_offsets"][0]) % state[name].itemsize == 0


# --- the stored dtype and the fingerprint --------------------------------------------------


def test_an_upcast_checkpoint_is_stored_in_its_own_dtype(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = tiny_gpt2(dtype=dtype)
        folder = tmp_path / str(dtype)
        model.save_pretrained(folder)
        stored = {name: load_model(folder, dtype=name) for name in ("float32", "float64", "auto")}
        own = load_model((model, None))
        for loaded in stored.values():
            assert loaded.stored_dtype is dtype
            assert loaded.fingerprint == own.fingerprint
        assert stored["float32"].dtype is torch.float32
        assert stored["auto"].dtype is (torch.float32 if dtype is torch.float16 else dtype)
        snapshot = ModelSnapshot.read(write(stored["float32"], tmp_path / f"{dtype}-store"))
        assert snapshot.stored_dtype == str(dtype).removeprefix("torch.")
        assert snapshot.run_dtype == "float32"


def test_parameters_rounded_for_the_run_are_stored_as_they_ran(tmp_path: Path) -> None:
    model = tiny_gpt2()
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = load_model(tmp_path / "checkpoint", dtype="float16")
    assert loaded.stored_dtype is torch.float16
    assert loaded.fingerprint == load_model((tiny_gpt2(dtype=torch.float16), None)).fingerprint
    exact = load_model(tmp_path / "checkpoint")
    assert exact.stored_dtype is exact.dtype is torch.float32
    assert exact.fingerprint != loaded.fingerprint


def test_the_fingerprint_follows_every_weight_and_nothing_else() -> None:
    model = tiny_gpt2()
    before = load_model((model, None)).fingerprint
    assert load_model((tiny_gpt2(), byte_level_tokenizer())).fingerprint == before
    seen = {before}
    for _, parameter in model.named_parameters():
        flat = parameter.data.reshape(-1)
        value = flat[-1].clone()
        flat[-1] = torch.nextafter(value, value + 1)
        fingerprint = load_model((model, None)).fingerprint
        assert fingerprint not in seen
        seen.add(fingerprint)
        flat[-1] = value
    assert load_model((model, None)).fingerprint == before
    assert load_model((tiny_gpt2(tie_word_embeddings=False), None)).fingerprint not in seen


def test_the_fingerprint_follows_names_shapes_and_dtypes() -> None:
    tensor = torch.arange(6, dtype=torch.int32)
    states = [
        {"a": tensor},
        {"b": tensor},
        {"a": tensor.reshape(2, 3)},
        {"a": tensor.view(torch.uint8)},
        {"a": tensor, "b": tensor.clone()},
        {"a": tensor, "b": tensor},
    ]
    weight = {"w": torch.ones(1)}
    assert len({encode_parameters(state | weight)[0].fingerprint for state in states}) == 6


def test_the_files_are_the_same_wherever_the_model_lay(tmp_path: Path) -> None:
    for name in ("one", "other"):
        folder = tmp_path / name / "tiny"
        tiny_gpt2().save_pretrained(folder)
        byte_level_tokenizer().save_pretrained(folder)
    first = load_model(tmp_path / "one" / "tiny")
    assert first.name == "tiny"
    assert first.tokenizer is not None
    first.tokenizer("truncated", truncation=True, max_length=2)
    second = load_model(tmp_path / "other" / "tiny")
    contents = [
        {key: b"".join(parts) for key, parts in snapshot_files(loaded).items()}
        for loaded in (first, second, second)
    ]
    assert contents[0] == contents[1] == contents[2]
    assert all(str(tmp_path).encode() not in data for data in contents[0].values())
    assert list(contents[0])[-1] == SNAPSHOT_KEY


# --- damage ---------------------------------------------------------------------------------


def read_all(root: Path) -> tuple[Any, ...]:
    weights = open_model(root)
    tensors = [
        weights.weight(location, layer).tobytes()
        for location in weights.architecture.weights
        for layer in ((0, 1) if location.has_layers else (None,))
    ]
    readout = {name: values.tobytes() for name, values in read_readout(root).items()}
    return weights.dimensions, tensors, readout, vocabulary_pieces(root)


def attempt(read: Callable[[], Any]) -> tuple[Any, str]:
    """What was read, or the complaint about damage."""
    try:
        return read(), ""
    except StoreDamaged as error:
        return None, str(error)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load_model((tiny_gpt2(n_layer=2, vocab_size=310), byte_level_tokenizer()))
    return write(loaded, tmp_path_factory.mktemp("intact"))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_flipped_bit_is_an_error_or_changes_nothing(
    intact: Path, tmp_path: Path, data: st.DataObject
) -> None:
    expected = read_all(intact)
    key = data.draw(st.sampled_from(stored_keys(intact)), label="file")
    original = (intact / key).read_bytes()
    position = data.draw(st.integers(0, len(original) - 1), label="byte")
    damaged = bytearray(original)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(intact, copy)
    (copy / key).write_bytes(damaged)
    found, complaint = attempt(lambda: read_all(copy))
    if complaint:
        assert key in complaint
    else:
        assert found == expected
        # Only padding and what is read by others alone may pass.
        assert key in (PARAMETERS_KEY, "model/readout.sections", "model/tokenizer_config.json")


def test_every_bit_of_a_tensor_and_of_the_header_is_checked(tmp_path: Path) -> None:
    state = {"w": torch.randn(3), "v": torch.ones(2)}
    encoded, _ = encode_parameters(state)
    original = b"".join(encoded)
    path = tmp_path / "parameters"
    for position in range(len(original)):
        for bit in (0, 2, 5):
            damaged = bytearray(original)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                opened = ParameterFile(path, "parameters")
                found = [opened.array(name) for name in state]
            except StoreDamaged:
                continue
            assert original[position] in b" ", position
            assert all(
                np.array_equal(array, tensor.numpy())
                for array, tensor in zip(found, state.values(), strict=True)
            )


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_a_cut_parameter_file_is_damaged(intact: Path, tmp_path: Path, cut: int) -> None:
    shutil.copytree(intact, tmp_path / "copy")
    path = tmp_path / "copy" / PARAMETERS_KEY
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(StoreDamaged, match=r"model\.safetensors"):
        read_all(tmp_path / "copy")


def test_a_missing_file_is_named(intact: Path, tmp_path: Path) -> None:
    for key in ModelSnapshot.read(intact).files:
        if key == "model/tokenizer_config.json":
            continue
        copy = tmp_path / Path(key).name
        shutil.copytree(intact, copy)
        (copy / key).unlink()
        with pytest.raises(StoreDamaged, match="is missing") as damaged:
            read_all(copy)
        assert damaged.value.kind is ErrorKind.MISSING_FILE
    with pytest.raises(StoreDamaged, match=r"snapshot\.json is missing"):
        open_model(tmp_path / "nothing")


def test_the_record_holds_what_it_was_given(intact: Path) -> None:
    snapshot = ModelSnapshot.read(intact)
    assert set(snapshot.files) | {SNAPSHOT_KEY} == set(stored_keys(intact))
    assert snapshot.architecture == "gpt2"
    for key, check in snapshot.files.items():
        assert check.size == (intact / key).stat().st_size


# --- wrong use -------------------------------------------------------------------------------


def test_wrong_layers_and_dtypes_are_refused(intact: Path) -> None:
    weights = open_model(intact)
    for location, layer in ((W.MLP_TO_HIDDEN, 2), (W.MLP_TO_HIDDEN, None), (W.EMBEDDING, 0)):
        with pytest.raises(InvalidInput, match=str(location)) as refused:
            weights.weight(location, layer)
        assert refused.value.kind is ErrorKind.UNKNOWN_LAYER
    with pytest.raises(InvalidInput, match="float16"):
        weights.weight(W.EMBEDDING, dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(Unavailable, match="mlp_pre_act's bias"):
        weights.attention_bias(L.MLP_PRE_ACT, 0)


def test_a_shape_that_contradicts_the_config_is_damage() -> None:
    loaded = load_model((tiny_gpt2(), None))
    dimensions = replace(loaded.dimensions, vocabulary_size=54)
    weights = ModelWeights(loaded.architecture, dimensions, loaded.parameters)
    with pytest.raises(StoreDamaged, match="shape"):
        weights.weight(W.EMBEDDING)


def test_unknown_parameter_dtypes_are_refused() -> None:
    with pytest.raises(InvalidInput, match="complex64"):
        encode_parameters({"w": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="C64"):
        Parameter("C64", (1,), lambda: memoryview(b""))


# --- other families' weight layouts ------------------------------------------------------------


def test_weight_sources_describe_the_layouts_of_other_families() -> None:
    heads, channels, width = 3, 2, 5
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(3, heads, width, channels))  # (q k v, head, channel, head_channel)
    biases = rng.normal(size=(3, heads, channels))
    per_head = np.stack([maps[part, head] for head in range(heads) for part in range(3)])
    per_head_bias = np.stack([biases[part, head] for head in range(heads) for part in range(3)])
    linear = np.concatenate(list(per_head), axis=1).T  # nn.Linear: (out, in)
    for part in range(3):
        source = WeightSource(
            "w", transposed=True, heads=Heads.OUTPUT, part=part, parts=3, parts_within_head=True
        )
        assert np.array_equal(source.arrange(linear, heads), maps[part])
        bias = WeightSource(
            "b", heads=Heads.OUTPUT, part=part, parts=3, parts_within_head=True
        ).arrange(per_head_bias.reshape(-1), heads)
        assert np.array_equal(bias, biases[part])
    separate = np.concatenate(list(maps[1]), axis=1).T
    source = WeightSource("w", transposed=True, heads=Heads.OUTPUT)
    assert np.array_equal(source.arrange(separate, heads), maps[1])
    output = rng.normal(size=(heads, channels, width))
    source = WeightSource("w", transposed=True, heads=Heads.INPUT)
    assert np.array_equal(source.arrange(output.reshape(-1, width).T, heads), output)
    gain = rng.normal(size=width)
    assert np.array_equal(WeightSource("g", addend=1.0).arrange(gain, heads), gain + 1)


# --- the vocabulary ----------------------------------------------------------------------------


def unigram_tokenizer() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("▁def", -1.0), ("▁", -2.0), ("a▁b", -3.0), ("é", -4.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    backend.add_special_tokens(["<s>"])
    return backend


def byte_fallback_tokenizer() -> Tokenizer:
    vocabulary = {"<unk>": 0, "▁the": 1, "the": 2, "▁": 3, "日": 4}
    vocabulary |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_tokens([AddedToken("<extra>", special=False)])
    return backend


def word_piece_tokenizer() -> Tokenizer:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "run": 1, "##ning": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return backend


def word_end_tokenizer() -> Tokenizer:
    backend = Tokenizer(models.BPE({"low</w>": 0, "lo": 1}, []))
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    return backend


def regex_tokenizer() -> Tokenizer:
    from tokenizers import Regex

    backend = Tokenizer(models.WordLevel({"a__b": 0, "__": 1}, unk_token="__"))
    backend.decoder = decoders.Replace(Regex("_+"), " ")
    return backend


def plain_tokenizer() -> Tokenizer:
    return Tokenizer(models.WordLevel({"x": 0, "▁y": 1}, unk_token="x"))


@pytest.mark.parametrize(
    "build",
    [
        lambda: byte_level_tokenizer().backend_tokenizer,
        unigram_tokenizer,
        byte_fallback_tokenizer,
        regex_tokenizer,
        plain_tokenizer,
    ],
)
def test_texts_equal_the_tokenizers_own_decoding(build: Callable[[], Tokenizer]) -> None:
    backend = build()
    pieces = decode_vocabulary(backend.to_str().encode())
    assert [piece.token_id for piece in pieces] == sorted(backend.get_vocab().values())
    added = {number: token.content for number, token in backend.get_added_tokens_decoder().items()}
    for token_id, piece, text, _ in pieces:
        assert piece == backend.id_to_token(token_id)
        decoded = backend.decode([token_id], skip_special_tokens=False)
        # An added token is matched as it is written; byte-level decoders garble its accents.
        assert text == added.get(token_id, decoded), piece


def test_word_ends_and_continuations_are_kept_apart() -> None:
    # The tokenizers trim these at the end of a text; inside one the space counts.
    texts = [piece.text for piece in decode_vocabulary(word_end_tokenizer().to_str().encode())]
    assert texts == ["low ", "lo"]
    texts = [piece.text for piece in decode_vocabulary(word_piece_tokenizer().to_str().encode())]
    assert texts == ["[UNK]", "run", "ning"]


def test_the_stored_vocabulary_is_the_tokenizers(intact: Path) -> None:
    tokenizer = byte_level_tokenizer()
    pieces = vocabulary_pieces(intact)
    assert len(pieces) == len(tokenizer)
    assert pieces[0] == VocabularyPiece(0, "<|endoftext|>", "<|endoftext|>", True)
    assert {piece.text for piece in pieces if piece.special} == {"<|endoftext|>"}
    assert "two words" in {piece.text for piece in pieces}
    assert any("\ufffd" in piece.text for piece in pieces)
    assert "\n" in {piece.text for piece in pieces}
    for token_id, _, text, _ in pieces:
        decoded = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        assert text == ("naïve" if text == "naïve" else decoded)


def test_a_model_without_a_tokenizer_has_no_vocabulary(tmp_path: Path) -> None:
    assert vocabulary_pieces(write(load_model((tiny_gpt2(), None)), tmp_path)) == []


# --- the readout ---------------------------------------------------------------------------------


def brute_readout(model: GPT2LMHeadModel) -> dict[str, npt.NDArray[Any]]:
    found: dict[str, list[npt.NDArray[Any]]] = {}
    for layer in range(model.config.n_layer):
        weights = {name: one.numpy() for name, one in expected_weights(model, layer).items()}
        effect = weights[W.MLP_TO_RESIDUAL] @ (
            weights[W.LAYER_NORM_GAIN_FINAL][:, None] * weights[W.UNEMBEDDING]
        )
        effect -= effect.mean(axis=1, keepdims=True)
        circuits = np.einsum("hdc,hce->hde", weights[W.ATTN_TO_VALUE], weights[W.ATTN_TO_RESIDUAL])
        effect = effect.astype(np.float32)
        down = np.argsort(-effect, axis=1, kind="stable")[:, :10]
        up = np.argsort(effect, axis=1, kind="stable")[:, :10]
        for name, values in {
            "write_norm": np.linalg.norm(weights[W.MLP_TO_RESIDUAL], axis=1),
            "read_norm": np.linalg.norm(weights[W.MLP_TO_HIDDEN], axis=0),
            "bias": weights[W.MLP_HIDDEN_BIAS],
            "promoted_token": down,
            "promoted_score": np.take_along_axis(effect, down, 1),
            "suppressed_token": up,
            "suppressed_score": np.take_along_axis(effect, up, 1),
            "head_write_norm": np.linalg.norm(weights[W.ATTN_TO_RESIDUAL], axis=(1, 2)),
            "head_value_output_norm": np.linalg.norm(circuits, axis=(1, 2)),
        }.items():
            found.setdefault(name, []).append(values)
    return {name: np.stack(values) for name, values in found.items()}


@pytest.mark.parametrize("vocabulary", [7, 10, 11, 53])
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("blocks", [(1024, 4096), (5, 9), (1000, 10), (7, 1)])
def test_the_readout_equals_brute_force(
    monkeypatch: pytest.MonkeyPatch, vocabulary: int, duplicates: bool, blocks: tuple[int, int]
) -> None:
    model = tiny_gpt2(vocab_size=vocabulary)
    if duplicates:
        # Few distinct tokens: whole runs of ties, some across the cut at ten.
        embedding = model.state_dict()["transformer.wte.weight"]
        embedding.copy_(embedding[torch.arange(vocabulary) % 4].clone())
    monkeypatch.setattr(readout_module, "_NEURON_BLOCK", blocks[0])
    monkeypatch.setattr(readout_module, "_VOCABULARY_BLOCK", blocks[1])
    found = compute_readout(load_model((model, None)).weights())
    expected = brute_readout(model)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].shape == values.shape
        if values.dtype.kind == "i":
            assert found[name].dtype == np.int32
            assert np.array_equal(found[name], values), name
        else:
            is_score = name.endswith("score")
            assert found[name].dtype == (np.float32 if is_score else np.float64)
            assert np.allclose(
                found[name], values, rtol=1e-6 if is_score else 1e-14, atol=1e-6 * is_score
            ), name


def test_the_stored_readout_is_the_computed_one(tmp_path: Path) -> None:
    loaded = load_model((tiny_gpt2(), None))
    root = write(loaded, tmp_path)
    stored, again = read_readout(root), compute_readout(open_model(root))
    for name, values in compute_readout(loaded.weights()).items():
        assert stored[name].dtype == values.dtype
        assert np.array_equal(stored[name], values)
        assert np.array_equal(again[name], values)


# --- loading ----------------------------------------------------------------------------------------


def test_the_shipped_model_loads() -> None:
    loaded = load_model("demo", device="cpu")
    assert (loaded.name, loaded.revision) == ("demo", None)
    assert loaded.dtype is torch.float32
    assert loaded.stored_dtype is torch.float16
    assert loaded.tokenizer is not None
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_model_in_memory_is_left_as_it_is() -> None:
    model = tiny_gpt2().train()
    loaded = load_model((model, None))
    assert loaded.model is model
    assert loaded.name == "in-memory"
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for options in ({"device": "cpu"}, {"dtype": "float32"}, {"revision": "main"}):
        with pytest.raises(InvalidInput, match="model in memory"):
            load_model((model, None), **options)
    with pytest.raises(InvalidInput, match="Linear"):
        load_model((torch.nn.Linear(1, 1), None))  # type: ignore[arg-type]


def test_a_folder_without_a_tokenizer_loads_without_one(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    assert load_model(tmp_path).tokenizer is None


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    del state["transformer.h.1.mlp.c_fc.bias"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match=r"incomplete: transformer\.h\.1\.mlp\.c_fc\.bias"):
        load_model(tmp_path)


def test_weights_of_the_wrong_shape_are_refused(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["transformer.wpe.weight"] = state["transformer.wpe.weight"][:5].clone()
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match="wpe"):
        load_model(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_gpt2()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match=r"must hold config\.json and model\.safetensors"):
        load_model(tmp_path)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InvalidInput, match="Cannot load the model"):
        load_model(tmp_path)


def test_an_unknown_architecture_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba_of_tomorrow"}')
    with pytest.raises(InvalidInput, match="mamba_of_tomorrow") as refused:
        load_model(tmp_path)
    assert refused.value.kind is ErrorKind.UNSUPPORTED_MODEL


def offline(*_: object, **__: object) -> None:
    raise ConnectionError("no network")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a folder", "~/models/x"])
def test_what_is_neither_folder_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="no folder") as refused:
        load_model(name)
    assert refused.value.kind is ErrorKind.INVALID_ARGUMENT


def test_a_hub_model_that_cannot_be_had_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(model_module, "model_info", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InvalidInput, match="neither cached nor reachable") as refused:
        load_model("nobody-here/no-such-model", revision="v1")
    assert refused.value.kind is ErrorKind.INVALID_ARGUMENT


def test_a_cached_hub_model_loads_offline_with_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--somebody--tiny"
    folder = repository / "snapshots" / commit
    tiny_gpt2().save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(model_module, "model_info", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for revision in (None, "main", commit):
        loaded = load_model("somebody/tiny", revision=revision)
        assert (loaded.name, loaded.revision) == ("somebody/tiny", commit)
        assert loaded.fingerprint == load_model((tiny_gpt2(), None)).fingerprint
        assert loaded.tokenizer is not None
    with pytest.raises(InvalidInput, match="neither cached nor reachable"):
        load_model("somebody/tiny", revision="another")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"device": "abacus"}, "Device 'abacus'"),
        ({"revision": "main"}, "revision 'main'"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        load_model(tmp_path, **options)


def test_reading_a_model_imports_neither_torch_nor_transformers(intact: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from actstore.store.model import pieces, readout, weights\n"
        "from actstore.store.vocabulary import WeightLocationType\n"
        f"root = Path({str(intact)!r})\n"
        "weights.open_model(root).weight(WeightLocationType.EMBEDDING)\n"
        "readout.read_readout(root), pieces.vocabulary_pieces(root)\n"
        "assert not {'torch', 'transformers', 'tokenizers', 'safetensors'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
