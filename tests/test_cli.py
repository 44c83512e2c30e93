"""The command line: every command, its JSON, its exit codes, and what it never prints."""

import errno
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from rich.console import Console
from tiny_gpt2 import tiny_gpt2
from tiny_ingest import tiny_tokenizer
from typer.testing import CliRunner, Result

import actstore
from actstore.cli import app, progress
from actstore.cli.display import byte_text, duration_text, print_table, token_strip, visible
from actstore.cli.output import json_text
from actstore.cli.statements import csv_text
from actstore.store.errors import ErrorKind

COMMANDS = (
    *("demo", "estimate", "plan", "ingest", "info", "locations", "scalars"),
    *("topk", "examples", "derive", "sql", "verify", "compact"),
)
HOSTILE = "red \x1b[31m bell \x07 del \x7f c1 \x9b2J over \u202e tab\t\n"
SMALL = ("--segment-rows", "512", "--batch-tokens", "256")


def run(*arguments: object, columns: int = 200) -> Result:
    """Run a command; an exception that is not an exit fails the test with its traceback."""
    environment = {"COLUMNS": str(columns), "TERMINAL_WIDTH": str(columns)}
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, words, env=environment, catch_exceptions=False)


def answer(*arguments: object) -> Any:
    """The JSON of a command that succeeds."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(exit_code: int, *arguments: object) -> dict[str, str]:
    """The error of a command that fails, the same as text and as JSON."""
    result = run(*arguments, "--json")
    assert (result.exit_code, result.stdout) == (exit_code, ""), result.output
    error: dict[str, str] = json.loads(result.stderr.splitlines()[-1])["error"]
    assert error.keys() == {"kind", "message"}
    assert error["kind"] in list(ErrorKind)
    plain = run(*arguments)
    assert plain.exit_code == exit_code
    assert plain.stderr.splitlines()[-1].startswith("error: ") or "\n" in error["message"]
    return error


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_gpt2(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    records = [
        {"body": f"the {n} cats and the {n * 7} dogs {HOSTILE}" * 3, "label": f"l{n % 3}"}
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def options(corpus: Path) -> tuple[object, ...]:
    return (corpus, "--text-column", "body", *SMALL)


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, model: Path, options: tuple[object, ...]
) -> Path:
    out = tmp_path_factory.mktemp("stores") / "store"
    report = answer("ingest", model, *options, "--out", out)
    assert report["stored"] == report["planned"] > 512
    return out


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    return shutil.copytree(store, tmp_path / "copy")


def test_help_names_every_command_with_an_example() -> None:
    general = run("--help")
    for command in COMMANDS:
        assert f"\n  {command} " in general.stdout
        shown = run(command, "--help")
        assert shown.exit_code == 0
        assert f"Examples:\n    actstore {command}" in shown.stdout


@pytest.mark.parametrize(
    ("command", "documented"),
    [
        (
            "ingest",
            "out locations keep context stride bos dtype limit-tokens max-bytes append shuffle"
            + " text-column columns revision device segment-rows batch-tokens worker set json",
        ),
        ("estimate", "out locations keep context dtype limit-tokens max-bytes append json"),
        ("plan", "out locations context stride bos limit-tokens append shuffle json"),
        (
            "topk",
            "layer neuron head channel where units per distinct least by special json explain",
        ),
        ("examples", "kind distinct window where seed special json"),
        ("derive", "sequence layer json out"),
        ("sql", "format out json"),
        ("demo", "out limit-tokens"),
        ("info", "json"),
        ("verify", "json"),
        ("compact", "json"),
        ("locations", "json"),
        ("scalars", "json"),
    ],
)
def test_documented_options_are_there(command: str, documented: str) -> None:
    shown = run(command, "--help").stdout
    for option in documented.split():
        assert f"--{option}" in shown, option


def test_version_and_wrong_use() -> None:
    assert run("--version").stdout == f"actstore {actstore.__version__}\n"
    assert run("no-such-command").exit_code == 2
    assert run("topk").exit_code == 2


def test_ingest_again_changes_nothing(
    store: Path, model: Path, options: tuple[object, ...]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    result = run("ingest", model, *options, "--out", store)
    assert result.exit_code == 0
    assert "0 missing" in result.stdout
    assert "0 by this run" in result.stdout
    assert "next:" in result.stdout
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()} == before


def test_ingest_reports_counts_sizes_and_errors(
    model: Path, options: tuple[object, ...], tmp_path: Path
) -> None:
    report = answer("ingest", model, *options, "--out", tmp_path / "s", "--keep", "q=raw")
    assert report["missing"] == 0
    assert report["resume"] is None
    assert report["bytes_written"] > 0
    assert report["peak_memory"] > 0
    assert report["errors"].keys() == {
        "resid_post_embedding",
        "attn_query",
        "mlp_post_act",
        "resid_post_mlp",
    }
    assert all(error < 1e-3 for error in report["errors"].values())
    files = [path for path in (tmp_path / "s").rglob("*") if path.is_file()]
    assert report["estimate"]["files"] == len(files)
    written = sum(path.stat().st_size for path in files)
    assert abs(report["estimate"]["total_bytes"] - written) < 0.1 * written


def test_text_of_ingest_has_estimate_progress_and_counts(
    model: Path, options: tuple[object, ...], tmp_path: Path
) -> None:
    result = run("ingest", model, *options, "--out", tmp_path / "s")
    assert result.exit_code == 0
    assert "to write" in result.stderr
    assert result.stderr.index("to write") < result.stderr.index("forward passes:")
    assert "(100%)" in result.stderr
    for word in ("stored", "no document dropped", "tokens/s", "peak memory", "self-check"):
        assert word in result.stdout
    quiet = run("ingest", model, *options, "--out", tmp_path / "q", "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")


def test_ctrl_c_prints_the_line_that_resumes(
    model: Path,
    options: tuple[object, ...],
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Interrupting(progress.PhaseProgress):
        def __call__(self, phase: str, done: int, total: int) -> None:
            super().__call__(phase, done, total)
            if phase == "forward" and 512 < done < total:
                # What the interpreter makes of SIGINT, at a moment of our choosing.
                raise KeyboardInterrupt

    out = tmp_path / "a store"
    with monkeypatch.context() as patched:
        patched.setattr("actstore.cli.ingesting.PhaseProgress", Interrupting)
        stopped = run("ingest", model, *options, "--out", out)
    assert stopped.exit_code == 0
    line = stopped.stdout.splitlines()[-1].strip()
    words = shlex.split(line)
    assert words[:2] == ["actstore", "ingest"]
    assert answer("info", out)["missing"]
    resumed = answer(*words[1:])
    assert 0 < resumed["written"] < resumed["segments"]
    assert resumed["missing"] == 0
    expected, found = answer("info", store), answer("info", out)
    assert {**found, "path": ""} == {**expected, "path": ""}


def test_ctrl_c_while_planning_resumes_too(
    model: Path, options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("actstore.ingest.pipeline.plan_ingest", interrupt)
    arguments = ("ingest", model, *options, "--out", tmp_path / "s")
    assert run(*arguments).exit_code == 0
    stopped = answer(*arguments)
    expected = ["actstore", *map(str, arguments), "--json"]
    assert (stopped["interrupted"], shlex.split(stopped["resume"])) == (True, expected)


def test_estimate_writes_nothing_and_is_right(
    model: Path, options: tuple[object, ...], store: Path, tmp_path: Path
) -> None:
    found = answer("estimate", model, *options, "--out", tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    arrays = {
        key: sum(path.stat().st_size for path in (store / "arrays" / key).glob("c.*"))
        for key in found["bytes_by_array"]
    }
    assert found["bytes_by_array"] == arrays
    assert found["seconds"] > found["rerun_seconds"] > 0
    assert found["tokens"] == answer("info", store)["tokens"]
    assert found["files"] == sum(path.is_file() for path in store.rglob("*"))
    nothing_left = answer("estimate", model, *options, "--out", store)
    assert (nothing_left["tokens"], nothing_left["total_bytes"]) == (0, 0)
    text = run("estimate", model, *options, "--max-bytes", "1kB").stdout
    assert "to write" in text
    assert "would refuse" in text


def test_plan_counts_without_writing(
    model: Path, options: tuple[object, ...], store: Path, tmp_path: Path
) -> None:
    found = answer("plan", model, *options, "--out", tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    info = answer("info", store)
    assert found["documents"] == 12
    assert [found[name] for name in ("tokens", "sequences", "segments")] == [
        info["tokens"],
        info["sequences"],
        info["segments_planned"],
    ]
    assert 0 <= found["padding_share"] < 1
    assert found["segments_committed"] == 0
    text = run("plan", model, *options, "--limit-tokens", "0.2k").stdout
    assert "(limited)" in text
    assert "padding" in text


def test_info_locations_and_scalars(store: Path) -> None:
    info = answer("info", store)
    assert info["locations"]["mlp_post_act"]["dtype"] == "float16"
    text = run("info", store).stdout
    assert f"{info['tokens']:,}" in text
    assert "resid_post_mlp" in text
    known = {row["location"]: row for row in answer("locations")["rows"]}
    assert known["mlp_post_act"]["axes"] == ["layer", "token", "neuron"]
    assert len(known) == 20
    held = {row["name"]: row["kind"] for row in answer("locations", store)["rows"]}
    assert held["mlp_post_act"] == "stored"
    assert held["mlp_pre_act"] == "reconstructed"
    scalars = [row["scalar"] for row in answer("scalars")["rows"]]
    assert "mlp_write_norm" in scalars
    for listing in (run("locations"), run("locations", store), run("scalars")):
        assert listing.exit_code == 0
        assert "mlp_post_act" in listing.stdout


def test_topk_is_what_the_library_says(store: Path) -> None:
    shown = answer(
        "topk", store, "mlp_write_norm", "-k", 4, "--layer", 1, "--where", "label = 'l1'"
    )
    with actstore.open(store) as opened:
        expected = opened.topk("mlp_write_norm", k=4, layers=1, where="label = 'l1'")
    assert shown["rows"] == expected.rows()
    assert shown["certificate"] == json.loads(json_text(expected.certificate.to_json()))
    assert {"layer", "token", "neuron", "value", "sequence", "position", "text"} == shown["rows"][
        0
    ].keys()


def test_topk_takes_every_restriction(store: Path) -> None:
    def rows(*restriction: object) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = answer("topk", store, *restriction)["rows"]
        return found

    assert {row["neuron"] for row in rows("mlp_post", "--neuron", 3, "--neuron", 5)} == {3, 5}
    assert [row["layer"] for row in rows("mlp_post", "--per", "layer", "-k", 1)] == [0, 1]
    least = [row["value"] for row in rows("mlp_post", "--least", "-k", 3)]
    assert least == sorted(least)
    sequences = [row["sequence"] for row in rows("mlp_post", "--distinct", "sequence", "-k", 9)]
    assert len(set(sequences)) == 9
    magnitudes = [abs(row["value"]) for row in rows("mlp_write_norm", "--by", "magnitude")]
    assert magnitudes == sorted(magnitudes, reverse=True)
    assert {row["layer"] for row in rows("blocks.1.hook_resid_post", "--channel", 2)} == {1}
    assert {row["head"] for row in rows("attn_query", "--head", 1, "-k", 2)} == {1}
    assert rows("mlp_post", "--units", "layer = 0 AND neuron < 2", "-k", 5)
    assert any(row["position"] == 0 for row in rows("resid_post_mlp", "--special", "-k", 500))


def test_topk_prints_a_table_and_explains(store: Path) -> None:
    plain = run("topk", store, "mlp_write_norm", "-k", 3).stdout.splitlines()
    assert " ".join(plain[0].split()) == "layer token neuron value sequence position text"
    assert plain[-1].startswith("exact over ")
    explained = run("topk", store, "mlp_write_norm", "-k", 3, "--explain").stdout
    for word in ("plan", "pages read", "bound at the stop", "rows left out"):
        assert f"\n{word} " in explained


def test_examples_show_contexts(store: Path) -> None:
    found = answer("examples", store, "mlp_post_act", "1:7", "-k", 3, "--window", "4,2")
    assert found["unit"] == [1, 7]
    for row in found["rows"]:
        assert len(row["texts"]) == len(row["values"]) <= 7
        assert row["values"][row["focus"]] == row["value"]
    assert found["certificate"]["scalar"] == "mlp_post_act"
    for kind in ("top", "bottom", "random", "quantile"):
        text = run("examples", store, "mlp_post_act", "1:7", "-k", 3, "--kind", kind).stdout
        assert text.count("«") == 3, text
    everywhere = answer("examples", store, "mlp_post", "1/7", "-k", 60, "--distinct", "none")
    assert len({row["sequence"] for row in everywhere["rows"]}) < 60


def test_derive_prints_json_and_files(store: Path, tmp_path: Path) -> None:
    found = answer("derive", store, "mlp_write_norm", "--sequence", 1, "--layer", 1)
    with actstore.open(store) as opened:
        expected = opened.derive("mlp_write_norm", sequences=[1], layers=[1])
    values = np.array([row["values"] for row in found["rows"]], np.float32)
    assert np.array_equal(values, expected.numpy()[0])
    assert found["certificate"]["dims"] == ["layer", "token", "neuron"]
    assert found["rows"][0]["layer"] == 1
    out = tmp_path / "values.npz"
    written = answer("derive", store, "mlp_write_norm", "--sequence", 1, "--out", out)
    assert (written["rows"], written["certificate"]["out"]) == ([], str(out))
    with np.load(out) as arrays:
        assert np.array_equal(arrays["values"][1], expected.numpy()[0])
        assert arrays["token"].tolist() == expected.rows.token.tolist()
    table = run("derive", store, "mlp_write_norm", "--sequence", 1, "--sequence", 2).stdout
    assert "layer 0 strongest" in table
    norm = run("derive", store, "mlp_input_layer_norm_scale", "--sequence", 0).stdout
    assert "layer 1" in norm
    assert "strongest" not in norm
    outside = run("derive", store, "resid_post_embedding", "--sequence", 0).stdout
    assert "strongest" in outside


def test_sql_in_every_format(store: Path, tmp_path: Path) -> None:
    query = "SELECT document, label, n_tokens / 0.0 AS endless FROM documents ORDER BY 1 LIMIT 2"
    table = run("sql", store, query).stdout.splitlines()
    assert table[0].split() == ["document", "label", "endless"]
    assert table[2].split() == ["0", "l0", "inf"]
    assert run("sql", store, query, "--format", "csv").stdout.splitlines()[1] == "0,l0,inf"
    found = answer("sql", store, query)
    assert found["rows"][1] == {"document": 1, "label": "l1", "endless": None}
    assert found["certificate"]["rows"] == 2
    assert run("sql", store, query, "--format", "json").stdout == json.dumps(found) + "\n"
    out = tmp_path / "rows.parquet"
    assert run("sql", store, query, "--format", "parquet", "--out", out).exit_code == 0
    assert parquet.read_table(out).column("label").to_pylist() == ["l0", "l1"]
    csv = tmp_path / "rows.csv"
    assert run("sql", store, query, "--format", "csv", "--out", csv).exit_code == 0
    assert csv.read_text().startswith("document,label,endless\n0,l0,inf\n")


def test_sql_tables_end_and_other_statements_show(store: Path) -> None:
    cut = run("sql", store, "FROM tokens", "--rows", 5)
    assert len(cut.stdout.splitlines()) == 2 + 5
    assert "first 5 rows" in cut.stderr
    whole = run("sql", store, "FROM documents", "--rows", 0)
    assert len(whole.stdout.splitlines()) == 2 + 12
    assert whole.stderr == ""
    total = run("sql", store, "SELECT sum(n_tokens) * 1000 AS total FROM documents").stdout
    assert re.fullmatch(r"\d{1,3}(,\d{3})+", total.splitlines()[-1].strip())
    assert "neurons" in run("sql", store, "SHOW TABLES").stdout
    assert "Projection" in run("sql", store, "EXPLAIN SELECT 1").stdout


def test_verify_and_compact(copy: Path) -> None:
    sound = answer("verify", copy)
    assert (sound["ok"], sound["findings"]) == (True, [])
    shown = run("verify", copy)
    assert "all sound" in shown.stdout
    assert "files (100%)" in shown.stderr.splitlines()[-1]
    shard = next((copy / "arrays" / "mlp_post_act").rglob("c.*"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    (copy / "stray.txt").write_text("?")
    damaged = run("verify", copy)
    assert damaged.exit_code == 1
    assert shard.relative_to(copy).as_posix() in damaged.stdout
    report = run("verify", copy, "--json")
    assert report.exit_code == 1
    findings = {one["path"]: one["problem"] for one in json.loads(report.stdout)["findings"]}
    assert findings == {shard.relative_to(copy).as_posix(): "damaged", "stray.txt": "unknown"}
    for derived in ("*.duckdb", "*.json"):
        next((copy / "catalog").glob(derived)).unlink()
    assert (copy / answer("compact", copy)["snapshot"]).is_file()
    assert "files cover all" in run("compact", copy).stdout


def test_errors_have_a_kind_and_an_exit_code(store: Path, tmp_path: Path) -> None:
    def kind(exit_code: int, *arguments: object) -> str:
        return refusal(exit_code, *arguments)["kind"]

    assert kind(2, "info", tmp_path) == "not_a_store"
    assert kind(2, "topk", tmp_path / "nowhere", "mlp_post") == "not_a_store"
    assert kind(2, "topk", store, "mlp_right_norm") == "unknown_scalar"
    assert kind(2, "topk", store, "mlp_post", "--layer", 9) == "unknown_layer"
    assert kind(2, "topk", store, "blocks.1.mlp.hook_post", "--layer", 0) == "unknown_layer"
    assert kind(2, "topk", store, "mlp_post", "--neuron", 9999) == "unknown_unit"
    assert kind(2, "topk", store, "mlp_post", "-k", 0) == "invalid_argument"
    assert kind(2, "topk", store, "mlp_post", "--where", "no_such = 1") == "invalid_sql"
    assert kind(2, "examples", store, "mlp_post", "x") == "invalid_argument"
    assert kind(2, "examples", store, "mlp_post", "0:1", "--window", "3") == "invalid_argument"
    assert kind(2, "examples", store, "mlp_post", "0:1", "--distinct", "q") == "invalid_argument"
    assert kind(2, "derive", store, "mlp_post", "--sequence", 10**6) == "unknown_row"
    assert kind(2, "derive", store, "mlp_post", "-s", 0, "-o", "x.txt") == "invalid_argument"
    assert kind(2, "sql", store, "DROP TABLE tokens") == "invalid_sql"
    assert kind(2, "sql", store, "SELECT 'x'::INT") == "invalid_sql"
    parquet_only = run("sql", store, "SELECT 1", "--format", "parquet")
    assert (parquet_only.exit_code, parquet_only.stderr[:7]) == (2, "error: ")


def test_a_damaged_store_is_not_a_wrong_use(copy: Path) -> None:
    next((copy / "commits" / "base").glob("0*.json")).write_text("{}")
    assert refusal(3, "info", copy)["kind"] == "malformed_file"


def test_a_newer_format_is_refused(copy: Path) -> None:
    manifest = copy / "store.json"
    manifest.write_text(manifest.read_text().replace('{"', '{"added":1,"', 1))
    assert refusal(3, "info", copy)["kind"] == "checksum_mismatch"
    manifest.write_text(manifest.read_text().replace('"format":1', '"format":99'))
    assert refusal(2, "info", copy)["kind"] == "newer_format"


def test_bad_ingests_are_refused(
    model: Path, corpus: Path, options: tuple[object, ...], store: Path, tmp_path: Path
) -> None:
    def kind(exit_code: int, *arguments: object) -> str:
        return refusal(exit_code, "ingest", *arguments)["kind"]

    out = ("--out", tmp_path / "s")
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert kind(2, model, empty, *out) == "empty_corpus"
    assert kind(2, model, tmp_path / "*.nothing", *out) == "empty_corpus"
    assert kind(2, model, *out) == "empty_corpus"
    assert kind(2, model, corpus, *out) == "invalid_corpus"
    assert kind(2, model, *options, *out, "--locations", "mlp_poost") == "unknown_location"
    assert kind(2, model, *options, *out, "--keep", "mlp_post") == "invalid_argument"
    assert kind(2, model, *options, *out, "--limit-tokens", "many") == "invalid_argument"
    assert kind(2, model, *options, *out, "--worker", "3") == "invalid_argument"
    assert kind(2, tmp_path / "no-model", *options, *out) == "invalid_argument"
    assert kind(1, model, *options, *out, "--max-bytes", "10kB") == "too_large"
    assert not (tmp_path / "s").exists()
    assert kind(2, model, *options, "--out", store, "--context", 16) == "config_conflict"
    assert kind(2, model, empty, corpus.with_name("other.txt"), *out) == "empty_corpus"


def test_a_read_only_target_is_refused(
    model: Path, options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "link", refuse)
    error = refusal(1, "ingest", model, *options, "--out", tmp_path / "s")
    assert error["kind"] == "read_only"
    assert "choose another path" in error["message"]


def test_further_locations_come_as_a_set(model: Path, copy: Path) -> None:
    added = ("ingest", model, "--out", copy, "--set", "queries", "--locations", "attn_query")
    report = answer(*added)
    assert report["missing"] == 0
    assert answer("info", copy)["locations"]["attn_query"]["segments"] > 0
    assert answer(*added)["written"] == 0


def test_control_characters_never_reach_the_terminal(store: Path) -> None:
    outputs = [
        run("sql", store, "SELECT text, piece FROM tokens", "--rows", 0).output,
        run("sql", store, "SELECT chr(27) || '[31m' AS \"a\x1bb\"").output,
        run("sql", store, "SELEC '\x1b[31m'").output,
        run("sql", store, "SELECT chr(127), chr(155)", "--json").output,
        run("topk", store, "mlp_post", "-k", 400).output,
        run("topk", store, "mlp_post", "-k", 400, "--json").output,
        run("examples", store, "mlp_post", "0:3", "-k", 12).output,
        run("derive", store, "mlp_post", "--sequence", 0).output,
        run("info", "no\x1bstore\u202e").output,
        run("info", "no\x1bstore", "--json").output,
    ]
    assert "\\x1b" in outputs[0]
    for output in outputs:
        kinds = {(c, unicodedata.category(c)) for c in output if c != "\n"}
        assert not {c for c, kind in kinds if kind in ("Cc", "Cf", "Co", "Cs")}


def test_csv_is_raw_in_a_file_and_safe_on_a_terminal() -> None:
    import pyarrow as pa

    table = pa.table({"text": ["a\x1bb", None], "many": [["x"], None]})
    assert csv_text(table, safe=False) == 'text,many\na\x1bb,"[""x""]"\n,\n'
    assert "\x1b" not in csv_text(table, safe=True)


def test_a_strip_shades_and_fits() -> None:
    texts = ["the", "\n", " cat", " ", " sat", " down"]
    values = [0.0, -1.0, 0.5, 2.0, float("nan"), 0.01]
    strip = token_strip(texts, values, focus=3)
    assert strip.plain == "the↵ cat«␠» sat down"
    shaded = {strip.plain[span.start : span.end]: span.style for span in strip.spans}
    assert shaded.keys() == {"↵", " cat", "«␠»"}
    assert str(shaded["«␠»"]).endswith("on #ff8c00")
    assert token_strip(texts, values, 3, width=9).plain == "… cat«␠»…"
    assert token_strip(["x" * 50], [1.0], 0, width=9).plain == f"«{'x' * 50}»"

    coloured, plain = io.StringIO(), io.StringIO()
    Console(file=coloured, force_terminal=True, color_system="truecolor").print(strip)
    Console(file=plain, force_terminal=True, color_system=None).print(strip)
    assert "48;2;255;140;0" in coloured.getvalue()
    assert plain.getvalue().strip() == strip.plain


@pytest.mark.parametrize("width", [20, 50])
def test_tables_keep_numbers_whole_and_cut_long_texts(width: int) -> None:
    rows = [[1234567, 7654321, "x" * 100, 0.5], [1, 2, "\x1b", None]]
    file = io.StringIO()
    print_table(Console(width=width, file=file), ["token", "bytes", "text", "value"], rows)
    text = file.getvalue()
    assert "\n1234567 " in text  # the number of a row is its name
    assert "7,654,321" in text
    assert "x…" in text
    assert "\\x1b" in text
    assert "0.5000" in text
    assert max(map(len, text.splitlines())) == max(width, 7 + 9 + 8 + 6 + 3 * 3)


def test_words_for_people() -> None:
    assert visible("a\u202eb\ud800\u00a0") == "a\\u202eb\\ud800\u00a0"
    assert [byte_text(n) for n in (0, 1000, 12_345_678)] == ["0 B", "1.00 kB", "12.3 MB"]
    assert duration_text(3599) == "59 min 59 s"
    assert json.loads(json_text({"a": [float("inf"), b"\x01", {1}]})) == {"a": [None, "01", [1]]}
    with pytest.raises(TypeError):
        json_text(object())


def test_the_demo_tells_its_story_and_reuses_its_store(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "demo"
    first = run("demo", "--out", out, "--limit-tokens", "3k")
    assert first.exit_code == 0, first.output
    assert "forward passes:" in first.stderr
    folder = shlex.quote(str(out))
    for part in (
        f"actstore info {folder}",
        f"actstore examples {folder} mlp_post_act ",
        f"actstore topk {folder} mlp_write_norm",
        "FROM neurons WHERE NOT dead",
        "forward passes and writing",
        "next:",
    ):
        assert part in first.stdout, part
    assert first.stdout.count("«") >= 5
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = run("demo", "--out", out)
    assert again.exit_code == 0
    assert "nothing to ingest" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == files
    other = run("demo", "--out", store)
    assert other.exit_code == 2
    assert "other weights" in other.stderr


def test_metadata_commands_do_not_import_torch(store: Path) -> None:
    script = f"""
import sys
from typer.testing import CliRunner
import actstore
heavy = lambda: sorted({{"torch", "transformers"}} & sys.modules.keys())
assert not heavy(), ("import actstore", heavy())
from actstore.cli import app
store = {str(store)!r}
for words in (
    ["--help"], ["ingest", "--help"], ["info", store], ["sql", store, "FROM neurons LIMIT 3"],
    ["topk", store, "mlp_write_norm"], ["examples", store, "mlp_post_act", "0:1"],
    ["verify", store], ["locations", store], ["scalars"], ["compact", store],
):
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert not heavy(), (words, heavy())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "actstore.cli"]
    shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"actstore {actstore.__version__}\n"
    failed = subprocess.run(
        [*command, "info", tmp_path], capture_output=True, text=True, check=False
    )
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: ")
