"""One record: every output shows the columns that the record declares."""

import csv
import io
import json
from dataclasses import asdict, fields

import pytest

from hasten.bench.result import Result, Settings, StreamResult, StreamSettings, read_result
from hasten.bench.row import Baseline, Column, Row, StreamRow, columns, late
from hasten.bench.tables import as_csv, as_markdown, table_of
from hasten.cli.common import show_result
from hasten.errors import ReportError


def measured(method, psnr, budget=9, library="hasten", **more):
    return Row(
        id=f"{method}-{budget}",
        method=method,
        library=library,
        budget=budget,
        computed_steps=float(budget),
        flops_ratio=5.29,
        seconds=0.4,
        psnr=psnr,
        cache_bytes=393216,
        **more,
    )


@pytest.fixture
def result():
    return Result(
        created="2026-11-26T00:00:00+00:00",
        command="hasten bench",
        environment={"hasten": "0.2.0", "torch": "2.13.0", "device": "cpu: x, 1 threads"},
        model="a-model",
        settings=Settings(prompts=["a"], seed=0, height=64, width=64, steps=50, guidance=1.0),
        baseline=Baseline(steps=50, computed_steps=50.0, flops=10, seconds=2.0, flops_ratio=1.0, cache_bytes=0),
        rows=[
            measured("euler", 38.1, library="plain"),
            measured("foca:schedule=even", 49.92),
            measured("hicache", 41.6, 7),
            Row(id="x", method="dbcache", library="cache-dit", budget=9, failed="not installed"),
        ],
        missing={"lpips": "no weights"},
    )


def test_every_output_has_the_declared_headings_and_figures(result, capsys):
    show_result(result)
    terminal = " ".join(capsys.readouterr().out.split())
    markdown = as_markdown(table_of(result))
    for text in (terminal, markdown):
        for heading in ("computed", "FLOPs ratio", "time s", "PSNR dB", "cache"):
            assert heading in text
        for shown in ("49.92", "384 KiB", "foca, even steps", "plain Euler", "9 computed steps", "7 computed steps"):
            assert shown in text
        assert "LPIPS was not measured: no weights" in text
        assert "Not measured: dbcache (cache-dit), 9 computed steps: not installed" in text
        assert "SSIM dB" not in text
        assert "temporal" not in text  # nothing in this result has it
        assert "NFE" not in text  # where there is little room
    assert "**5.29**" not in markdown  # more of it is not better
    assert "**49.92**" in markdown
    wide = [column.heading for column in table_of(result, wide=True).columns]
    # What decides comes first; nothing measured a step ratio or an NFE.
    assert wide == ["PSNR", "FLOPs ratio", "computed", "time", "cache"]
    assert all(column.tooltip for column in (*columns(Row).values(), *columns(StreamRow).values()))


def test_csv_has_a_line_for_every_row_and_all_columns(result):
    lines = list(csv.DictReader(io.StringIO(as_csv(result))))
    assert [line["method"] for line in lines] == ["euler", "euler", "foca:schedule=even", "hicache", "dbcache"]
    assert lines[0].keys() >= set(columns(Row))
    assert lines[2]["psnr"] == "49.92"
    assert (lines[4]["psnr"], lines[4]["failed"]) == ("", "not installed")


def test_a_result_is_read_as_it_was_written(result, tmp_path):
    file = tmp_path / "out.json"
    result.write(file)
    assert read_result(file) == result
    assert json.loads(file.read_text())["schema"] == 2
    content = asdict(result)
    content["rows"][0]["psnr"] = float("inf")
    file.write_text(json.dumps(content))
    with pytest.raises(ReportError, match="finite"):
        read_result(file)


def test_a_failed_row_has_no_figures(result):
    failed = result.failed[0]
    assert {getattr(failed, name) for name in columns(Row)} == {None}
    assert result.groups() == {9: [result.rows[1], result.rows[0]], 7: [result.rows[2]]}


def test_the_best_of_a_column_is_its_least_or_its_most():
    assert Column("a", "b", better="more").best([1.0, None, 3.0]) == 3
    assert Column("a", "b", better="less").best([1.0, None, 3.0]) == 1
    assert Column("a", "b").best([1.0, 3.0]) is None
    assert Column("a", "b", better="less").best([1.0, None]) is None  # nothing to compare with


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        (Column("a", "b"), 1.005, "1.00"),
        (Column("a", "b", digits=None), 9.0, "9"),
        (Column("a", "b", digits=None), 8.6667, "8.667"),
        (Column("a", "b", unit="B"), 1310720, "1.25 MiB"),
        (Column("a", "b", unit="B"), 1e6, "976.6 KiB"),
        (Column("a", "b", unit="%", digits=1), 0.0213, "2.1 %"),
        (Column("a", "b"), None, "-"),
    ],
)
def test_values_are_written_as_their_column_says(column, value, text):
    assert column.text(value) == text


def test_streams_have_a_column_for_everything_that_drifts(capsys):
    rows = [
        StreamRow(
            method=name,
            seconds_per_frame=0.5,
            latency_ratio=ratio,
            attention_seconds=1.0,
            attention_ratio=ratio,
            work_ratio=ratio,
            kv_ratio=ratio,
            overhead=0.021,
            cache_bytes=2**20,
            psnr=psnr,
            drift={"identity": [1.0, 0.5, None, 0.25]},
        )
        for name, ratio, psnr in (("full history", 1.0, None), ("sliding-window:window=5", 2.5, 31.26))
    ]
    result = StreamResult(created="2026-11-26", environment={}, model="m", settings=StreamSettings(), rows=rows)
    show_result(result)
    text = " ".join(capsys.readouterr().out.split())
    for shown in ("identity", "0.250", "2.50", "31.3", "2.1 %", "1 MiB", "sliding-window, window=5"):
        assert shown in text
    assert late([None, None]) is None
    assert {field.name for field in fields(StreamRow)} > set(columns(StreamRow))
