"""Objectives: what they compute, at each sequence's own last position, and their names."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_ingest import tiny_tokenizer

from actstore.ingest.objectives import (
    OBJECTIVES,
    LogitDiff,
    LogitMinusMean,
    NextTokenLogProb,
    Objective,
    Probabilities,
    Zero,
    parse_objective,
    resolve_target,
)
from actstore.ingest.settings import DEFAULT_GRADIENTS, IngestSettings
from actstore.store.errors import ErrorKind, InvalidInput

VOCABULARY = 11
LENGTHS = (5, 1, 3)
IDS = torch.arange(15).reshape(3, 5) % VOCABULARY


def logits(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 5, VOCABULARY, generator=generator, dtype=torch.float64).to(dtype)


def value(objective: Objective, columns: Any = None, of: torch.Tensor | None = None) -> Any:
    return objective(logits() if of is None else of, IDS, LENGTHS, columns)


# Values


def test_next_token_log_probabilities_are_summed_over_each_sequence() -> None:
    table = logits().log_softmax(-1)
    expected = [
        sum(float(table[row, at, IDS[row, at + 1]]) for at in range(length - 1))
        for row, length in enumerate(LENGTHS)
    ]
    assert expected[1] == 0
    assert value(NextTokenLogProb()).tolist() == pytest.approx(expected, rel=1e-12)


def test_others_read_the_last_position_of_each_sequence() -> None:
    last = torch.stack([logits()[row, length - 1] for row, length in enumerate(LENGTHS)])
    probability = last.softmax(-1)
    for objective, expected in (
        (LogitDiff(4), last[:, 4]),
        (LogitDiff((4, 7), 2), last[:, [4, 7]].mean(1) - last[:, 2]),
        (LogitDiff(4, (1, 2, 3)), last[:, 4] - last[:, 1:4].mean(1)),
        (LogitMinusMean(4), last[:, 4] - last.mean(1)),
        (LogitMinusMean((4, 5)), last[:, 4:6].mean(1) - last.mean(1)),
        (Probabilities((4, 5)), probability[:, 4] + probability[:, 5]),
        (Zero(), torch.zeros(3, dtype=torch.float64)),
    ):
        torch.testing.assert_close(value(objective), expected, rtol=1e-12, atol=0)


def test_every_document_brings_its_own_targets() -> None:
    columns = [{"answer": 4, "wrong": (1,)}, {"answer": (5,), "wrong": [2, 3]}, {"answer": (6, 7), "wrong": 0}]  # fmt: skip
    last = torch.stack([logits()[row, length - 1] for row, length in enumerate(LENGTHS)])
    expected = [
        last[0, 4] - last[0, 1],
        last[1, 5] - last[1, 2:4].mean(),
        last[2, 6:8].mean() - last[2, 0],
    ]
    found = value(LogitDiff("answer", "wrong"), columns)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "objective",
    [NextTokenLogProb(), LogitDiff(4, 2), LogitMinusMean(4), Probabilities((4, 5)), Zero()],
)
def test_padding_changes_neither_value_nor_gradient(objective: Objective) -> None:
    def run(padding: float) -> tuple[torch.Tensor, torch.Tensor]:
        given_logits = logits()
        for row, length in enumerate(LENGTHS):
            given_logits[row, length:] = padding
        given_logits.requires_grad_(True)
        found = objective(given_logits, IDS, LENGTHS, None)
        (gradient,) = torch.autograd.grad(found.sum(), given_logits)
        return found, gradient

    for one, other in zip(run(0.0), run(100.0), strict=True):
        assert torch.equal(one, other)
    _, gradient = run(7.0)
    for row, length in enumerate(LENGTHS):
        assert not gradient[row, length:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_small_dtypes_are_widened(dtype: torch.dtype) -> None:
    rounded = logits(dtype)
    for objective in (NextTokenLogProb(), LogitDiff(4, 2), Probabilities(4), Zero()):
        found = value(objective, of=rounded)
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found, value(objective, of=rounded.double()).float(), rtol=1e-5, atol=1e-6
        )


def test_missing_or_impossible_targets_are_refused() -> None:
    with pytest.raises(InvalidInput, match="vocabulary has 11") as caught:
        value(LogitDiff(11))
    assert caught.value.kind is ErrorKind.TOKEN_OUT_OF_VOCABULARY
    with pytest.raises(InvalidInput, match="no columns were given"):
        value(LogitDiff("answer"))
    with pytest.raises(InvalidInput, match="there is only wrong"):
        value(LogitDiff("answer"), [{"wrong": 1}] * 3)
    with pytest.raises(InvalidInput, match="'Paris' where token ids"):
        value(LogitDiff("answer"), [{"answer": "Paris"}] * 3)


# Names

ids = st.integers(0, 2**40)
targets = ids | st.lists(ids, min_size=1, max_size=4) | st.text(min_size=1)
objectives = st.one_of(
    st.just(NextTokenLogProb()),
    st.just(Zero()),
    st.builds(LogitDiff, targets, targets | st.none()),
    st.builds(LogitMinusMean, targets),
    st.builds(Probabilities, targets),
)


@given(objectives)
def test_names_read_back(objective: Objective) -> None:
    again = parse_objective(objective.name)
    assert again == objective
    assert again.name == objective.name


@pytest.mark.parametrize(
    ("text", "objective"),
    [
        ("next_token_log_prob", NextTokenLogProb()),
        (" zero() ", Zero()),
        ("logit_diff(answer, distractor)", LogitDiff("answer", "distractor")),
        ("logit_diff('the answer', \"class\")", LogitDiff("the answer", "class")),
        ("logit_diff([5, 40], [9, 61])", LogitDiff((5, 40), (9, 61))),
        ("logit_diff([5])", LogitDiff(5)),
        ("logit_minus_mean(7)", LogitMinusMean(7)),
        ("probabilities((1,2))", Probabilities((1, 2))),
    ],
)
def test_spellings(text: str, objective: Objective) -> None:
    assert parse_objective(text) == objective
    assert parse_objective(parse_objective(text).name) == objective


def test_columns_are_those_that_are_named() -> None:
    assert LogitDiff("a", "b").columns == ("a", "b")
    assert LogitDiff("a", "a").columns == ("a",)
    assert LogitDiff(3, "b").columns == ("b",)
    assert NextTokenLogProb().columns == ()


@pytest.mark.parametrize(
    "text",
    ["loss", "logit_dif(3)", "", "logit_diff", "logit_diff()", "logit_diff(1, 2, 3)",
     "zero(1)", "logit_diff(target=3)", "logit_diff(-1)", "logit_diff(1.5)", "logit_diff(True)",
     "logit_diff([])", "logit_diff('')", "logit_diff(None)", "logit_diff(a.b)", "logit_diff(a(1))",
     "logit_diff(1", "x = 1", "logit_diff(*a)", "(" * 9000],
)  # fmt: skip
def test_what_is_no_objective_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_objective(text)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    with pytest.raises(InvalidInput):
        IngestSettings(objective=text)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_objective("loss")
    assert all(word in str(caught.value) for word in OBJECTIVES)


# Targets of documents


def test_a_column_holds_ids_or_the_text_of_one_token() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    the = tokenizer("the")["input_ids"]
    assert len(the) == 1
    for given_value, expected in (
        (5, (5,)),
        ("the", tuple(the)),
        ([5, 40], (5, 40)),
        ("[5, 40]", (5, 40)),
        ('["the", 7]', (*the, 7)),
        ("[", tuple(tokenizer("[")["input_ids"])),
    ):
        assert resolve_target(given_value, tokenizer, size, "it") == expected


@pytest.mark.parametrize(
    ("given_value", "words"),
    [
        ("quite a text", "'quite a text', which is"),
        ("", "which is 0 tokens"),
        (None, "is None"),
        (1.0, "is 1.0"),
        (True, "is True"),
        (-1, "token id -1"),
        (10**6, "token id 1000000"),
        ("[]", "is an empty list"),
        ("[1.5]", "is 1.5"),
    ],
)
def test_what_is_no_token_is_refused(given_value: object, words: str) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(InvalidInput, match="Column 'a' of document 3") as caught:
        resolve_target(given_value, tokenizer, len(tokenizer), "Column 'a' of document 3")
    assert words in str(caught.value)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(InvalidInput, match="no tokenizer"):
        resolve_target("the", None, 10, "it")
    assert resolve_target(3, None, 10, "it") == (3,)


# Settings


def test_gradients_are_those_that_all_others_follow_from() -> None:
    assert IngestSettings(objective="zero").chosen_gradients == DEFAULT_GRADIENTS
    assert IngestSettings().chosen_gradients == ()
    chosen = IngestSettings(objective=Zero(), gradients="z,resid_post").chosen_gradients
    assert [location.label for location in chosen] == [
        "attn_weighted_sum_of_values",
        "resid_post_mlp",
    ]


def test_a_further_set_may_hold_gradients_alone() -> None:
    assert IngestSettings(objective="zero", set_name="more").chosen == ()
    assert IngestSettings(objective="zero").chosen == IngestSettings().chosen != ()
    assert IngestSettings(objective="zero", locations="none").chosen == ()
    assert len(IngestSettings(objective="zero", set_name="more", locations="mlp_post").chosen) == 1


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"gradients": "mlp_post_act"}, "no objective"),
        ({"objective": "zero", "gradients": "pattern"}, "attended pairs"),
        ({"objective": "zero", "gradients": "mlp_poost"}, "mlp_poost"),
        ({"locations": "none"}, "no location to store"),
    ],
)
def test_settings_that_make_no_sense_are_refused(choices: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        IngestSettings(**choices)
