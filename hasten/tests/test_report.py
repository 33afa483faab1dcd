"""The HTML report: complete, self-contained, safe, and clear about bad input."""

import base64
import csv
import json
import re

import pytest
from PIL import Image

from hasten.bench.report import render_report
from hasten.errors import FileError, ReportError
from hasten.io import digest_of


def row(method, computed_steps, psnr, library="hasten", **more):
    figures = {"flops_ratio": 50 / computed_steps, "seconds": 0.2, "latency_ratio": 4.0, "cache_bytes": 98304}
    quality = {"psnr": psnr, "ssim": 0.98, "lpips": None, "flip": 0.03, "top1": 1.0}
    name = f"{method}-{computed_steps}"
    curve = None if library == "plain" else [0.0, 0.01, 0.02]
    return {
        "id": name,
        "method": method,
        "library": library,
        "params": {"interval": 7},
        "steps": 50,
        "budget": computed_steps,
        **figures,
        **quality,
        "error_per_step": curve,
        "per_prompt": [],
        "images": [f"out.images/{name}/00.png"],
        "note": "",
        **more,
    }


@pytest.fixture
def content(tmp_path):
    rows = [
        row("euler", 9, 41.111, "plain"),
        row("hicache", 9, 44.444),
        row("reuse", 9, None),
        row("hicache", 7, 40.5),
        {"id": "peer-9", "method": "peer", "library": "cache-dit", "failed": "not installed"},
    ]
    for name in ("baseline", "euler-9", "hicache-9", "reuse-9"):  # hicache-7 has no image
        path = tmp_path / "out.images" / name / "00.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), "orange").save(path)
    return {
        "schema": 2,
        "created": "2026-11-23T03:00:00+00:00",
        "environment": {"hasten": "0.1.0", "device": "cpu: a processor, 2 threads"},
        "model": "emoji-flux",
        "settings": {
            "prompts": ["a <script>alert(1)</script> & co"],
            "seed": 0,
            "height": 64,
            "width": 64,
            "steps": 50,
            "guidance": 1.0,
        },
        "baseline": {
            "steps": 50,
            "seconds": 0.9,
            "flops": 1_200_000_000,
            "top1": 0.95,
            "images": ["out.images/baseline/00.png"],
        },
        "rows": rows,
    }


def sealed(content):
    """The text of a file with this content and the digest that it has to have."""
    return json.dumps(content | {"digest": digest_of(content)})


def render(tmp_path, content):
    source = tmp_path / "out.json"
    source.write_text(content if isinstance(content, str) else sealed(content))
    return render_report(source, tmp_path / "deep" / "report.html").read_text()


def test_everything_is_there(tmp_path, content):
    page = render(tmp_path, content)
    for word in (
        "emoji-flux",
        "hicache",
        "reuse",
        "plain Euler",
        "cpu: a processor",
        "96 KiB",
        "9 computed steps",
        "7 computed steps",
    ):
        assert word in page
    assert page.count('<svg role="img"') == 4  # PSNR, FLIP, two of the error; LPIPS was not measured
    assert page.count("data:image/png;base64,") == 5  # baseline twice, once for each sheet
    assert page.count('class="missing"') == 1
    assert "Not measured: peer (cache-dit)" in page
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_narrow_screen_shows_how_near_and_how_fast_an_arm_is(tmp_path, content):
    headings = re.findall(r'<button type="button">([^<]+)</button></th>', render(tmp_path, content))
    assert headings[:3] == ["method", "PSNR dB", "speed-up"]
    assert {"steps", "cache", "SSIM"} <= set(headings)


def test_a_spread_stands_below_a_figure(tmp_path, content):
    content["baseline"]["spread"] = content["rows"][0]["spread"] = {"psnr": {"p10": 31.25, "p90": 47.5}}
    assert render(tmp_path, content).count("<small>31.25 to 47.50</small>") == 1  # the full run has no PSNR


def test_the_best_of_a_group_is_bold_and_plain_rows_are_marked(tmp_path, content):
    page = render(tmp_path, content)
    assert '<td class="best" data-value="44.444">44.44</td>' in page
    assert '<td data-value="41.111">41.11</td>' in page
    assert '<tr class="plain">' in page


def test_nothing_is_loaded_from_elsewhere_and_prompts_are_escaped(tmp_path, content):
    page = render(tmp_path, content)
    assert "http" not in page
    assert page.count("<script") == 1  # ours
    assert "alert(1)</script>" not in page
    assert "&lt;script&gt;" in page


def test_a_result_without_curves_or_methods_still_renders(tmp_path, content):
    content["rows"] = content["rows"][:1]
    assert page_has_no_error_chart(render(tmp_path, content))
    content["rows"] = []
    assert "emoji-flux" in render(tmp_path, content)


def page_has_no_error_chart(page):
    return "Error over the steps" not in page


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda c: "{", "no usable JSON"),
        (lambda c: json.dumps(c)[:200], "no usable JSON"),
        (lambda c: "[1, 2]", "not a result"),
        (lambda c: json.dumps(c | {"schema": 1}), "schema 1"),
        (lambda c: json.dumps(c), "damaged or changed by hand"),
        (lambda c: sealed(c).replace("44.444", "44.445"), "damaged or changed by hand"),
        (lambda c: sealed({k: v for k, v in c.items() if k != "baseline"}), "lacks 'baseline'"),
        (lambda c: sealed(c | {"rows": [{"id": "x"}]}), "rows[0] lacks 'method'"),
        (
            lambda c: sealed(c | {"baseline": c["baseline"] | {"seconds": "fast"}}),
            "baseline.seconds is 'fast', expected a finite number",
        ),
    ],
)
def test_bad_files_are_named_with_the_remedy(tmp_path, content, damage, says):
    with pytest.raises(ReportError, match=r"out\.json") as caught:
        render(tmp_path, damage(content))
    assert says in str(caught.value)
    assert "hasten" in str(caught.value)
    assert not (tmp_path / "deep").exists()


def test_nothing_outside_the_folder_and_nothing_but_images_is_embedded(tmp_path, content):
    (tmp_path / "out.images" / "secret.png").write_text("a password")
    Image.new("RGB", (8, 8)).save(tmp_path.parent / "outside.png")
    content["baseline"]["images"] = ["out.images/secret.png"]
    content["rows"][0]["images"] = ["../outside.png"]
    content["rows"] = content["rows"][:1]
    assert render(tmp_path, content).count("data:image") == 0


def test_the_result_is_never_replaced_and_a_bad_place_is_named(tmp_path, content):
    source = tmp_path / "out.json"
    source.write_text(sealed(content))
    with pytest.raises(ReportError, match="would replace"):
        render_report(source, source)
    assert source.read_text() == sealed(content)
    with pytest.raises(FileError, match="cannot be written"):
        render_report(source, source / "report.html")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ReportError, match="no such file"):
        render_report(tmp_path / "nowhere.json", tmp_path / "r.html")


def test_the_verdict_is_on_top_with_the_line_to_use(tmp_path, content):
    content["rows"][1]["spread"] = {"psnr": {"p10": 40.04, "p90": 47.06}}
    page = render(tmp_path, content)
    (first, *_) = page.split("<h2>")
    assert "hicache at 9 steps" in first
    assert "4.0 times faster" in first
    assert "3.3 dB above plain Euler" in first
    namespace = {"hasten": type("hasten", (), {"accelerate": staticmethod(lambda *a, **k: (a, k))}), "pipe": None}
    line = first.split("<code>")[1].split("</code>")[0].replace("&#39;", "'")
    assert eval(line, namespace) == ((None, "hicache"), {"computed_steps": 9})
    assert "<small>40.04 to 47.06</small>" in page


def test_a_method_of_another_version_has_a_verdict_without_the_line_to_use(tmp_path, content):
    content["rows"][1] = row("gone:interval=3", 9, 44.444)
    (first, *_) = render(tmp_path, content).split("<h2>")
    assert "gone" in first
    assert "9 steps" in first
    assert "accelerate(pipe, &#39;gone" not in first


def test_a_method_that_loses_is_said_to_lose(tmp_path, content):
    content["rows"][0]["psnr"] = 50.0
    assert "5.6 dB below plain Euler" in render(tmp_path, content)


def test_every_arm_is_in_the_legend_and_no_two_lines_look_alike(tmp_path, content):
    content["rows"] = [row(f"reuse:interval={i}", 9, 30.0 + i) for i in range(2, 30)]
    page = render(tmp_path, content)
    samples = [part.split("</svg>")[0] for part in page.split('<svg class="sample"')[1:]]
    assert len(samples) == len(set(samples)) == 28
    for number in range(28):
        assert f'data-line="line-{number}"' in page
        assert page.count(f'<g class="line-{number}"') == 3


def test_several_results_make_one_report(tmp_path, content):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, model in zip(files, ("emoji-flux", "another"), strict=True):
        file.write_text(sealed(content | {"model": model}))
    page = render_report(files, tmp_path / "both.html").read_text()
    assert page.index("<h1>emoji-flux</h1>") < page.index("<h1>another</h1>")
    assert 'href="#part-1">another (b.json)' in page
    tables = render_report(files, tmp_path / "both.md", "md").read_text()
    assert tables.count("| method |") == 2
    rows = render_report(files, tmp_path / "both.csv", "csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in rows if "hicache" in line] == ["a", "a", "b", "b"]
    files[0] = files[0].rename(tmp_path / "one, two.json")
    saved = render_report(files, tmp_path / "both.csv", "csv").read_text()
    assert {line[0] for line in csv.reader(saved.splitlines())} == {"result", "one, two", "b"}
    with pytest.raises(ReportError, match="would replace"):
        render_report(files, files[1])


def test_the_tables_can_be_saved_from_the_page(tmp_path, content):
    page = render(tmp_path, content)
    saved = base64.b64decode(page.split("data:text/csv;base64,")[1].split('"')[0]).decode()
    assert saved == render_report(tmp_path / "out.json", tmp_path / "o.csv", "csv").read_text()
