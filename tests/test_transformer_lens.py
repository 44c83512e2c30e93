"""Our cache beside TransformerLens' own, asked the same questions of the same model."""

from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import VARIANTS, tiny_model
from tokenizers import Tokenizer, models
from transformer_lens.ActivationCache import ActivationCache as TheirCache
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from actstore.ingest.model import load_model
from actstore.prompt import Prompt
from actstore.query.cache import ActivationCache

ARCHITECTURES = ("gpt2", "llama")
ROWS = ((1, 7, 3, 44, 5, 21, 9), (0, 12, 12, 52, 30, 2, 17))
TARGETS = torch.tensor([5, 31])
AGAINST = torch.tensor([9, 0])
# They compute in float32; on large values its own rounding passes the first of these.
TOLERANCE = 2e-5
OF_GREATEST = 2e-6

Caches = tuple[ActivationCache, TheirCache]


def unused_tokenizer() -> PreTrainedTokenizerFast:
    """They do not start without one. With a BOS token, they would reload it from a path."""
    words = {f"w{number}": number for number in range(VARIANTS["gpt2"][1]["vocab_size"])}
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w0"
    )
    return tokenizer


@cache
def asked(architecture: str) -> tuple[ActivationCache, TheirCache, torch.Tensor]:
    """Our cache, theirs, and their logits; each has a model of its own, as they change theirs."""
    wide = tiny_model(architecture, dtype=torch.float64, implementation="eager")
    loaded = load_model((wide, None))
    first, *others = (Prompt(loaded, row) for row in ROWS)
    bridge = TransformerBridge.boot_transformers(
        "in-memory",
        hf_model=tiny_model(architecture, implementation="eager"),
        tokenizer=unused_tokenizer(),
        device="cpu",
    )
    with torch.no_grad():
        logits, theirs = bridge.run_with_cache(torch.tensor(ROWS))
    assert isinstance(theirs, TheirCache)
    assert isinstance(logits, torch.Tensor)
    return first.cache(*others, compat="transformer_lens"), theirs, logits


@pytest.fixture(params=ARCHITECTURES)
def caches(request: pytest.FixtureRequest) -> Caches:
    ours, theirs, _ = asked(request.param)
    return ours, theirs


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, what: object) -> None:
    assert ours.shape == theirs.shape, what
    # Scores of what is not attended to: -inf, or the least number.
    masked = theirs <= torch.finfo(torch.float32).min
    assert torch.equal(ours <= torch.finfo(torch.float32).min, masked), what
    found, expected = ours[~masked].double(), theirs[~masked].detach().double()
    if not expected.numel():
        return
    allowed = max(TOLERANCE, OF_GREATEST * expected.abs().max().item())
    assert (found - expected).abs().max().item() <= allowed, what


def assert_same_answers(caches: Caches, method: str, *given: Any, **named: Any) -> torch.Tensor:
    ours, theirs = (getattr(one, method)(*given, **named) for one in caches)
    if named.get("return_labels"):
        (ours, our_labels), (theirs, their_labels) = ours, theirs
        assert our_labels == their_labels, (method, named)
    assert_same(ours, theirs, (method, named))
    assert isinstance(theirs, torch.Tensor)
    return theirs


def test_every_activation_under_its_name(caches: Caches) -> None:
    ours, theirs = caches
    centres = ours.has_pos_embed
    for name in ours:
        expected = theirs[name]
        if centres and name.endswith("hook_normalized"):
            # Since their 3.0 a LayerNorm's hook comes before gain and bias, ours after.
            norm: Any = theirs.model
            for part in name.removesuffix(".hook_normalized").split("."):
                norm = norm[int(part)] if part.isdigit() else getattr(norm, part)
            expected = expected * norm.weight + norm.bias
        assert_same(ours[name], expected, name)


@pytest.mark.parametrize(
    "key",
    [
        ("resid_pre", 0),
        ("resid_post", -1),
        ("attn_out", 1),
        ("mlp_out", 2),
        ("post", 1, "mlp"),
        ("q", 1),
        ("k", 1),
        ("v", 0),
        ("z", 2),
        ("pattern", -1),
        ("attn_scores", 0),
        ("scale", 1, "ln2"),
        ("scale", -2, "ln1"),
        "embed",
        "scale",
        "k1",
        "pattern0",
        "post2",
        "ln_final.hook_scale",
        "blocks.1.hook_resid_mid",
    ],
    ids=str,
)
def test_names_tuples_and_shorthands(caches: Caches, key: Any) -> None:
    ours, theirs = caches
    assert_same(ours[key], theirs[key], key)


@pytest.mark.parametrize("apply_ln", [False, True])
@pytest.mark.parametrize("pos_slice", [None, -1, (1, 4), [0, 2]], ids=str)
@pytest.mark.parametrize("layer", [None, 0, 1, -1])
def test_decompositions(caches: Caches, layer: int | None, pos_slice: Any, apply_ln: bool) -> None:
    named = {"apply_ln": apply_ln, "pos_slice": pos_slice, "return_labels": True}
    is_end = layer is None or layer == -1
    for mlp_input in (False,) if is_end else (False, True):
        entering = {**named, "mlp_input": mlp_input}
        for incl_mid in (False, True):
            assert_same_answers(caches, "accumulated_resid", layer, incl_mid, **entering)
        for mode in ("all", "mlp", "attn"):
            assert_same_answers(caches, "decompose_resid", layer, mode=mode, **entering)
        if layer != 0:
            assert_same_answers(caches, "decompose_resid", layer, incl_embeds=False, **entering)
        for expand in (False, True):
            assert_same_answers(
                caches, "get_full_resid_decomposition", layer, expand_neurons=expand, **entering
            )
    for incl_remainder in (False, True) if layer != 0 else (False,):
        rest = {**named, "incl_remainder": incl_remainder}
        assert_same_answers(caches, "stack_head_results", layer, **rest)
        for neurons in (None, (2, 5), [7, 1]):
            assert_same_answers(caches, "stack_neuron_results", layer, neuron_slice=neurons, **rest)


def test_contributions_in_directions(caches: Caches) -> None:
    channels = caches[0]["embed"].shape[-1]
    onto = torch.randn(channels, 3, generator=torch.Generator().manual_seed(0))
    for directions in (onto, onto[:, 0]):
        for apply_ln in (False, True):
            named = {"project_output_onto": directions, "apply_ln": apply_ln}
            assert_same_answers(caches, "get_full_resid_decomposition", **named)
            assert_same_answers(caches, "stack_neuron_results", None, **named)
        for layer in (0, 2):
            assert_same_answers(caches, "get_neuron_results", layer, project_output_onto=directions)


@pytest.mark.parametrize("pos_slice", [None, -1, (2, 6)], ids=str)
def test_logit_attributions(caches: Caches, pos_slice: Any) -> None:
    theirs = caches[1]
    at = {"pos_slice": pos_slice}
    for stack in (
        theirs.accumulated_resid(incl_mid=True, **at),
        theirs.decompose_resid(**at),
        theirs.stack_head_results(incl_remainder=True, **at),
        theirs.get_full_resid_decomposition(**at),
    ):
        assert_same_answers(caches, "logit_attrs", stack, 5, **at)
        assert_same_answers(caches, "logit_attrs", stack, 5, 9, **at)
        if pos_slice == -1:
            assert_same_answers(caches, "logit_attrs", stack, TARGETS, AGAINST, **at)
            assert_same_answers(caches, "logit_attrs", stack, 5, batch_slice=(1, 2), **at)


def test_the_logit_lens(caches: Caches) -> None:
    ours, theirs = caches
    whole = ours.logit_lens()
    expected = theirs.logit_lens(positions=None)
    assert whole.labels == expected.labels
    assert whole.logits is not None
    assert_same(whole.logits, expected.values, "logits")
    following = torch.tensor([[*row[1:], 4] for row in ROWS])
    found = ours.logit_lens(targets=following, top_k=4)
    at_targets = theirs.logit_lens(positions=None, targets=following)
    assert found.target_logits is not None
    assert found.top_logits is not None
    assert_same(found.target_logits, at_targets.values[..., 0], "target_logits")
    assert found.target_ranks is not None
    assert torch.equal(found.target_ranks, at_targets.readout.target_ranks[..., 0])
    best = theirs.logit_lens(positions=None, top_k=4)
    assert_same(found.top_logits, best.values, "top_logits")
    assert found.top_tokens is not None
    assert torch.equal(found.top_tokens, best.readout.top_ids)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_logits(architecture: str) -> None:
    ours, _, logits = asked(architecture)
    assert_same(ours["logits"], logits, "logits")
