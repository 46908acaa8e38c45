"""The report: one page without network, right in its figures, its plots readable SVG, its table sorted in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="the report needs the bench extra: pip install 'regard[bench]'")
pytest.importorskip("jinja2", reason="the report needs the bench extra: pip install 'regard[bench]'")

from typer.testing import CliRunner

from regard.bench import rows, summary
from regard.bench.cases import SUITES, parse
from regard.bench.plots import all_plots, standalone
from regard.bench.report import headline, write_report
from regard.cli import app

VOID = {"meta", "input", "br", "hr", "img", "link"}
FACTORS = {"flash": 1.4, "hopper": 1.9, "torch-flash": 1.0, "eager": 0.2}


def made_up_rows(suite="fa3"):
    """What a run of a suite on a GPU would write, without the GPU."""
    made = []
    for workload in SUITES[suite].workloads("cuda"):
        for name, factor in FACTORS.items():
            seconds = workload.flops() / (4e14 * factor) + 5e-6
            reference = workload.flops() / 4e14 + 5e-6
            ms = 1e3 * seconds
            made.append({
                "schema": 1, "suite": suite, "case": workload.name, "implementation": name, "mode": workload.mode,
                "device": "cuda", "date": "2026-01-02T03:04:05+00:00", "status": "ok", "chosen": "hopper",
                "environment": {"machine": "NVIDIA <H200>", "arch": "sm90", "torch": "2.11.0", "commit": "abc123"},
                "command": f"regard bench --case '{workload.name}' --implementation {name}",
                "workload": json.loads(json.dumps(vars(workload))), "ms": ms, "ms_low": 0.99 * ms, "ms_high": 1.01 * ms,
                "ms_interval": [ms, ms], "repetitions": 50, "timer": "events",
                "tflops": workload.flops() / seconds / 1e12, "gbs": workload.bytes() / seconds / 1e9,
                "matmul_tflops": 800.0, "copy_gbs": 4000.0, "matmul_share": workload.flops() / seconds / 8e14,
                "copy_share": workload.bytes() / seconds / 4e12, "flops": workload.flops(), "bytes": workload.bytes(),
                "reference": "torch-flash", "speedup": reference / seconds, "speedup_low": 1.0, "speedup_high": 1.0,
                "host_us": 30.0, "peak_bytes": workload.bytes() // 4, "input_bytes": workload.bytes() // 2,
                "result_bytes": workload.bytes() // 2, "error_ratio": 0.4,
            })  # fmt: skip
    refused = {name: made[0][name] for name in ("schema", "suite", "case", "mode", "device", "environment", "date")}
    made.append({**refused, "implementation": "sdpa", "status": "refused", "reason": "window: got a <b>window</b>"})
    return made


class Page(HTMLParser):
    """Checks that tags nest, and collects what the tests look at."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.cells, self.headings = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[name] for name in ("href", "src", "xlink:href", "srcset") if name in found]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] == "td" and data.strip():
            self.cells.append(data.strip())
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data.strip())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(made_up_rows(), folder / "report.html", plots=folder / "plots")
    return folder


@pytest.fixture(scope="module")
def page(report):
    return Page((report / "report.html").read_text())


def test_the_page_nests_and_its_ids_are_its_own(page):
    assert len(page.ids) == len(set(page.ids))


def test_a_machine_is_told_once_with_what_differed_between_its_runs(tmp_path):
    rows = made_up_rows()
    for row, clock, commit in zip(rows, (1575.0, 1875.5, 1800.0), ("abc123", "def456", "abc123"), strict=False):
        row["environment"] = {**row["environment"], "sm_clock_mhz": clock, "commit": commit}
    rows[3]["environment"] = {**rows[3]["environment"], "torch": "2.12.0"}
    write_report(rows, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count("<dt>machine</dt>") == 2, "another torch is another environment, another clock is not"
    assert "<dd>1575 to 1875.5</dd>" in text and "<dd>abc123, def456</dd>" in text


def test_the_page_asks_nothing_of_the_network(report, page):
    assert all(link.startswith("#") for link in page.links)
    text = (report / "report.html").read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names of XML, not addresses"
    assert "@import" not in text and "url(http" not in text


def test_every_part_is_there(page):
    assert page.headings == ["regard benchmarks", "Speed-up", "Throughput", "Roofline", "Memory", "Backend choice",
                             "All measurements", "Not timed"]  # fmt: skip


def test_the_headline_is_the_automatic_choice(report):
    made = made_up_rows()
    sentence = headline(made)
    ratios = [row["speedup"] for row in made if row["status"] == "ok" and row["implementation"] == "hopper"]
    assert f"{rows.geometric_mean(ratios):.2f}x the speed of torch-flash (geometric mean of 36 cases)" in sentence
    assert "NVIDIA <H200>" in sentence and f"{min(ratios):.2f}x" in sentence
    assert "NVIDIA &lt;H200&gt;" in (report / "report.html").read_text()


def test_the_table_has_every_figure(page):
    made = [row for row in made_up_rows() if row["status"] == "ok"]
    for row in made:
        assert row["case"] in page.cells
        assert f"{row['ms']:.4g}" in page.cells
        assert f"{row['speedup']:.2f}" in page.cells
    assert page.cells.count("hopper") == 36
    assert "window: got a <b>window</b>" in page.cells, "escaped, not interpreted"


def test_colours_follow_the_reader(report):
    text = (report / "report.html").read_text()
    for rule in ("prefers-color-scheme: dark", "@media print", "max-width: 40rem", 'name="viewport"', "color-scheme"):
        assert rule in text
    assert "currentColor" in text and "#010203" not in text and "#040506" not in text


def test_plots_are_whole_svg_files_for_light_and_dark(report):
    found = {path.stem: path.read_text() for path in (report / "plots").glob("*.svg")}
    assert set(found) == {"speedup", "throughput", "roofline", "memory", "choice"}
    for text in found.values():
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme:dark" in text
        assert "<metadata>" not in text, "no date: the same rows give the same file"
    texts = set(re.findall(r">([^<>]+)</text>", found["throughput"]))
    assert {"flash", "hopper", "d128 bf16 causal", "16k", "512", "TFLOP/s"} <= texts
    assert {"1.40", "flash / torch-flash"} <= set(re.findall(r">([^<>]+)</text>", found["speedup"]))


def test_the_same_rows_give_the_same_plots():
    assert all_plots(made_up_rows("longctx")) == all_plots(made_up_rows("longctx"))


def test_lengths_of_queries_and_keys_that_differ_can_be_drawn():
    plots = all_plots(made_up_rows("decode"))
    assert {"speedup", "throughput"} <= plots.keys()
    for _, svg in plots.values():
        ElementTree.fromstring(standalone(svg))


def test_small_rates_are_given_in_gflops():
    made = [{**row, "tflops": row["tflops"] / 1e5} for row in made_up_rows("longctx") if row["status"] == "ok"]
    assert "GFLOP/s" in all_plots(made)["throughput"][1]


def test_rows_without_a_reference_still_make_a_page(tmp_path):
    made = [row for row in made_up_rows("gqa") if row["implementation"] == "flash"]
    for row in made:
        for name in ("speedup", "speedup_low", "speedup_high", "reference"):
            del row[name]
    write_report(made, tmp_path / "page.html")
    assert Page((tmp_path / "page.html").read_text()).cells
    assert "Nothing here was measured beside a reference" in headline(made)
    assert "no speed-ups" in summary.text(made)


def test_language_model_rows_have_a_table_of_their_own(tmp_path):
    row = {**made_up_rows("longctx")[0], "suite": "model", "mode": "model", "case": "model-gemma", "prompt_tokens": 100,
           "decode_tokens_per_second": 12.34, "decode_speedup": 1.5, "speedup": 2.5}  # fmt: skip
    del row["workload"]
    write_report([row], tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert "Language model" in page.headings and {"12.3", "1.50", "2.50"} <= set(page.cells)
    write_report([row | {"decode_tokens_per_second": 0.0, "decode_speedup": None}], tmp_path / "page.html")
    assert {"0.0", "-"} <= set(Page((tmp_path / "page.html").read_text()).cells)


# --- The command


def command(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)], env={"COLUMNS": "400", "TERM": "dumb"})


def test_the_command_skips_what_is_no_row_and_says_so(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows.write(path, made_up_rows("longctx"))
    path.write_text("half a li" + "\n" + path.read_text() + "{}\n")
    result = command(path, "-o", tmp_path / "deep" / "r.html", "--plots", tmp_path / "p", "--title", "A & B")
    assert result.exit_code == 0, result.output
    assert "skipped 2 lines that are not a row" in result.stderr
    assert "hopper: " in result.stdout and f"wrote {tmp_path / 'deep' / 'r.html'}" in result.stdout
    assert Page((tmp_path / "deep" / "r.html").read_text()).headings[0] == "A & B"


@pytest.mark.parametrize("content, sentence", [(None, "a file of JSON lines"), ("nonsense\n", "at least one row")])
def test_no_rows_no_report(tmp_path, content, sentence):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    result = command(path, "-o", tmp_path / "r.html")
    assert result.exit_code == 2 and sentence in result.stderr
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("arguments, name", [(("-o", "."), "out"), (("--plots", "rows.jsonl"), "plots")])
def test_what_cannot_be_written_is_said_in_a_sentence(tmp_path, monkeypatch, arguments, name):
    monkeypatch.chdir(tmp_path)
    rows.write(Path("rows.jsonl"), made_up_rows("longctx"))
    result = command("rows.jsonl", *arguments)
    assert result.exit_code == 2 and f"{name}: got {arguments[1]}, needs a" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


# --- In a browser


BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)

SCRIPT = """<script>
const out = {}, table = document.getElementById("table");
const column = (index) => [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[index].textContent);
const click = (index) => table.tHead.rows[0].cells[index].querySelector("button").click();
click(2); out.up = column(2); out.sorted = table.tHead.rows[0].cells[2].getAttribute("aria-sort");
click(2); out.down = column(2);
click(0); out.cases = column(0);
const search = document.getElementById("search");
search.value = "d128 causal HOPPER"; search.dispatchEvent(new Event("input"));
out.found = column(0).map((name, i) => name + " " + column(1)[i]); out.count = document.getElementById("count").textContent;
search.value = ""; const select = document.getElementById("implementation");
select.value = "eager"; select.dispatchEvent(new Event("input")); out.eager = new Set(column(1)).size;
const wide = [...document.querySelectorAll("main > *")].filter((each) => each.getBoundingClientRect().right > innerWidth);
out.overflow = wide.map((each) => each.tagName + "." + each.className);
out.ink = getComputedStyle(document.querySelector("svg text, svg g")).color;
const result = document.createElement("pre"); result.id = "result"; result.textContent = JSON.stringify(out);
document.body.append(result);
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="browser: got none, needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_sorting_and_filtering_in_a_real_browser(report, tmp_path, width):
    page = tmp_path / "page.html"
    page.write_text((report / "report.html").read_text().replace("</body>", SCRIPT + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               f"--window-size={width},900", "--dump-dom"]  # fmt: skip
    done = subprocess.run([BROWSER, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found, done.stderr[-2000:]
    seen = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    times = [float(text) for text in seen["up"]]
    assert len(times) == 144 and times == sorted(times) and seen["sorted"] == "ascending"
    assert [float(text) for text in seen["down"]] == times[::-1]
    assert [parse(name).seqlen_q for name in seen["cases"][:4]] == [16384] * 4, "b1 first: by number, not by letter"
    assert len(seen["found"]) == 6 and all("d128" in name and name.endswith("hopper") for name in seen["found"])
    assert seen["count"] == "6 of 144" and seen["eager"] == 1
    assert seen["overflow"] == [], "nothing is wider than the window"


def test_the_template_is_package_data():
    import regard.bench

    assert (Path(regard.bench.__file__).parent / "report.html.j2").is_file()
