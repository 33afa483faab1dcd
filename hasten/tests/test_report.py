"""The HTML report: complete, self-contained, safe, and clear about bad input."""

import json

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
    assert page.count("<svg") == 2
    assert page.count("data:image/png;base64,") == 5  # baseline twice, once for each sheet
    assert page.count('class="missing"') == 1
    assert "Not measured: peer (cache-dit)" in page
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_best_of_a_group_is_bold_and_plain_rows_are_marked(tmp_path, content):
    page = render(tmp_path, content)
    assert '<td class="best">44.44</td>' in page
    assert "<td>41.11</td>" in page
    assert '<tr class="plain">' in page


def test_nothing_is_loaded_from_elsewhere_and_prompts_are_escaped(tmp_path, content):
    page = render(tmp_path, content)
    assert "http" not in page
    assert "<script" not in page
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
