"""The page: what a user wrote stays text, and a real browser opens it from disk and uses all of it.

The pictures are of one colour each, so that a pixel of the screen identifies the image.
"""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import minimize

from sdft.errors import UserError
from sdft.evaluation.page.write import thumbnail, write_page
from sdft.evaluation.results import (
    Estimate,
    Headline,
    HeatMap,
    ImageResult,
    MetricInfo,
    Results,
    SubjectSummary,
    Tradeoff,
    Verdict,
)

ALERT = """<script>alert(1)</script> it's "quoted" </script><!-- <img src=x onerror=alert(2)>"""
RIGHT_TO_LEFT = "חתול אדום 🐈 & שולחן"
PROMPTS = ("a photo of a cat", ALERT, RIGHT_TO_LEFT)
COLOURS = {"base": (200, 30, 30), "tuned": (30, 160, 30), "<b>blend</b>": (30, 30, 200)}
PHONE = {"width": 390, "height": 844}


def draw(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def picture(folder: Path, subject: str, number: int, prompt: str, seed: int) -> ImageResult:
    """Drawn in the subject's colour, a little lighter for each prompt and seed."""
    path = f"images/{number} #1 100%/{prompt[:2].encode().hex()}-{seed}.png"
    red, green, blue = COLOURS[subject]
    lighter = 10 * PROMPTS.index(prompt) + 5 * seed
    draw(folder / path, (red + lighter, green + lighter, blue + lighter))
    settings = {"prompt": prompt, "seed": seed, "sampler": "ddim", "cfg": 5.0, "negative": ""}
    return ImageResult(subject, {"prompt": prompt, "seed": seed}, path, settings, {"adherence": 0.25 + 0.01 * seed})


def compared(folder: Path) -> Results:
    """Three subjects, three prompts, two seeds, and one of everything else."""
    asked = list(product(enumerate(COLOURS), PROMPTS, (0, 1)))
    values = {"base": (0.30, 0.10), "tuned": (0.29, 0.80), "<b>blend</b>": (0.25, 0.50)}
    estimates = {
        subject: {
            "adherence": Estimate(adherence, adherence - 0.02, adherence + 0.02),
            "style": Estimate(style, style - 0.05, style + 0.05),
            "drift": Estimate(float("nan")),
        }
        for subject, (adherence, style) in values.items()
    }
    clear = Verdict("tuned", "base", "style", Estimate(0.7, 0.6, 0.8), 0.001, 2.5, 0.1, 6, "tuned has more style.")
    none = Verdict("tuned", "base", "adherence", Estimate(-0.01, -0.03, 0.01), 0.6, -0.1, 0.04, 6, "No difference.")
    return Results(
        title=f"base & tuned {ALERT}",
        settings={"steps": 12},
        axes={"prompt": PROMPTS, "seed": (0, 1)},
        subjects=[
            SubjectSummary("base", "base", "nano"),
            SubjectSummary(
                "tuned", "lora", "runs/x", cost={"seconds": 131.0, "bytes": 1_640_448, "parameters": 410_112}
            ),
            SubjectSummary("<b>blend</b>", "merge", "blend.safetensors"),
        ],
        metrics=[
            MetricInfo("adherence", "adherence", "higher", "How well a picture fits its prompt."),
            MetricInfo("style", "style gain", "higher", "0 is the base, 1 the style."),
            MetricInfo("drift", "drift", None, "How far it went."),
        ],
        pictures=[picture(folder, subject, n, prompt, seed) for (n, subject), prompt, seed in asked],
        figures=estimates,
        verdicts=[clear, none],
        tradeoff=Tradeoff("style", "adherence", ["base", "tuned"], "tuned", "Style at no detectable loss."),
        headline=Headline(f"Keep tuned: {ALERT}", "Style at no detectable loss."),
    )


def swept(folder: Path) -> Results:
    """Two ranks at two rates: each cell of the map is a subject."""
    cells, subjects, pictures = {}, [], []
    for number, (rank, rate) in enumerate(product((4, 16), (1e-4, 1e-3))):
        name = f"run {number}"
        subjects.append(SubjectSummary(name, "lora", f"multirun/{number}", varied={"rank": rank, "optimizer.lr": rate}))
        draw(folder / f"{number}.png", (50 * number, 0, 0))
        pictures += [ImageResult(name, {"prompt": prompt}, f"{number}.png", {"rank": rank}) for prompt in PROMPTS[:2]]
        cells[rank, rate] = Estimate(0.2 * number, 0.2 * number - 0.1, 0.2 * number + 0.1)
    metric = MetricInfo("style", "style gain", "higher", "0 is the base, 1 the style.")
    heat_map = HeatMap("style", "rank", "optimizer.lr", cells)
    return Results("sweep", {}, {"prompt": PROMPTS[:2]}, subjects, [metric], pictures, heat_maps=[heat_map])


def embedded(path: Path) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="results">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("a run #1 100%") / "report.html"
    write_page(path, compared(path.parent))
    return path


def test_what_a_user_wrote_is_data_and_not_markup(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert len(re.findall("<script|</script|<!--", text)) == 4
    data = embedded(report)
    assert data["axes"]["prompt"] == list(PROMPTS)
    assert data["figures"]["base"]["drift"]["value"] is None
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)


def test_a_small_picture_is_embedded_whole_and_a_large_one_reduced(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "small.png")
    draw(tmp_path / "large.png", (9, 99, 199), (1024, 512))
    small, large = (thumbnail(tmp_path / name, side=256) for name in ("small.png", "large.png"))
    read = [Image.open(io.BytesIO(base64.b64decode(x["uri"].split(",")[1]))) for x in (small, large)]
    assert np.array_equal(np.asarray(read[0]), noise)
    assert (small["width"], small["height"], small["whole"]) == (48, 64, True)
    assert read[1].size == (256, 128)
    assert (large["width"], large["height"], large["whole"]) == (1024, 512, False)


def test_a_missing_or_broken_picture_is_named_and_the_old_page_stays(tmp_path: Path) -> None:
    results, page = compared(tmp_path), tmp_path / "report.html"
    page.write_text("old")
    broken = tmp_path / results.pictures[3].path
    broken.write_bytes(b"not a picture")
    with pytest.raises(UserError, match=f"{re.escape(str(broken))}: not a readable image"):
        write_page(page, results)
    broken.unlink()
    with pytest.raises(UserError, match=f"{re.escape(str(broken))}: this image is missing"):
        write_page(page, results)
    assert page.read_text() == "old"
    assert not list(tmp_path.glob("*.partial"))


def colour_at(page, selector: str, x: float) -> tuple[int, ...]:
    """Of the screen, halfway down this element and at this share of its width."""
    image = Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")
    return image.getpixel((int(x * image.width), image.height // 2))


def shown(page) -> list[str]:
    return page.locator(".picture").evaluate_all("all => all.map(button => button.getAttribute('aria-label'))")


def test_pictures_stand_by_prompt_and_subject_and_text_stays_text(open_page, report: Path) -> None:
    page = open_page(report)
    assert page.title() == f"base & tuned {ALERT}".strip()
    assert page.locator("h1").text_content() == f"base & tuned {ALERT}"
    assert page.locator("#lead p").all_text_contents() == [f"Keep tuned: {ALERT}", "Style at no detectable loss."]
    assert page.locator("#grid tbody th").all_text_contents() == list(PROMPTS)
    assert page.locator("#grid thead th").all_text_contents() == list(COLOURS)
    assert len(shown(page)) == 18
    assert page.locator("script").count() == 2
    assert page.locator("main b", has_text="blend").count() == 0
    assert colour_at(page, '.picture[data-index="0"] img', 0.5) == COLOURS["base"]
    assert colour_at(page, '.picture[data-index="6"] img', 0.5) == COLOURS["tuned"]


def test_metrics_verdicts_costs_and_the_front_are_shown(open_page, report: Path) -> None:
    page = open_page(report)
    rows = page.locator("#figure-table tbody tr").all_inner_texts()
    assert [row.split()[0] for row in rows] == list(COLOURS)
    expected = [("0.300 best", "0.280 to 0.320"), ("0.800 best", "2 min", "1.64 MB", "410 k"), ("0.250", "0.500")]
    for row, parts in zip(rows, expected, strict=True):
        assert [part for part in parts if part not in row] == []
    assert [row.count("best") for row in rows] == [1, 1, 0]
    page.get_by_role("button", name="style gain").click()
    order = page.locator("#figure-table tbody th").all_text_contents()
    assert order == ["tuned", "<b>blend</b>", "base"]
    signs = page.locator(".sign").evaluate_all("all => all.map(sign => sign.getAttribute('aria-label'))")
    assert signs == ["better", "no detectable difference"]
    assert page.locator(".verdicts li").all_inner_texts()[1].endswith("No difference.")
    assert page.locator("#plot .point:not(.beaten)").count() == 2
    assert page.locator("#plot .beaten title").text_content().startswith("<b>blend</b>: 0.5000")
    assert page.locator("#plot .kept-label").text_content() == "tuned"
    dots = [page.locator("#plot .point .dot").nth(n).bounding_box() for n in range(3)]
    # base, tuned, blend: style grows to the right, adherence upwards.
    assert dots[0]["x"] < dots[2]["x"] < dots[1]["x"]
    assert dots[0]["y"] < dots[1]["y"] < dots[2]["y"]


def test_a_picture_is_enlarged_and_arrows_lead_on(open_page, report: Path) -> None:
    page = open_page(report, permissions=["clipboard-read", "clipboard-write"])
    page.locator('.picture[data-index="6"]').click()
    large = page.locator("#large")
    assert large.is_visible()
    assert page.locator("#large-subject").text_content() == "tuned"
    assert colour_at(page, "#stage", 0.5) == COLOURS["tuned"]
    assert page.locator("#place").text_content() == "3 of 18"
    page.locator("#copy").click()
    page.get_by_text("Copied").wait_for()
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    expected = {"prompt": PROMPTS[0], "seed": 0, "sampler": "ddim", "cfg": 5, "negative": ""}
    assert copied == {"subject": "tuned", **expected}
    page.keyboard.press("ArrowRight")
    assert "seed\n1" in page.locator("#large-settings").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#large-subject").text_content() == "<b>blend</b>"
    page.keyboard.press("ArrowDown")
    assert page.locator("#large-prompt").text_content() == ALERT
    # The link reaches the file, whatever is in its name.
    link = page.locator("#file").evaluate("link => link.href")
    assert link == (report.parent / compared(report.parent).pictures[14].path).as_uri()
    page.keyboard.press("Escape")
    assert not large.is_visible()
    # The close event of a dialog comes after it is hidden.
    page.locator('.picture[data-index="14"]:focus').wait_for()
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.dataset.index") == "12"
    page.keyboard.press("Enter")
    assert large.is_visible()


def test_a_large_picture_is_shown_from_its_file(open_page, tmp_path: Path) -> None:
    draw(tmp_path / "a?b.png", (30, 60, 90), (600, 400))
    one = ImageResult("base", {}, "a?b.png", {})
    write_page(tmp_path / "report.html", Results("one", {}, {}, [SubjectSummary("base", "base", "nano")], [], [one]))
    page = open_page(tmp_path / "report.html")
    page.locator(".picture").click()
    page.wait_for_function("document.getElementById('over').src.endsWith('a%3Fb.png')")
    assert page.locator("#over").evaluate("image => image.naturalWidth") == 600
    assert colour_at(page, "#stage", 0.5) == (30, 60, 90)


def test_two_subjects_are_compared_by_a_slider(open_page, report: Path) -> None:
    page = open_page(report)
    page.locator('.picture[data-index="0"]').click()
    page.locator("#other").select_option("tuned")
    assert colour_at(page, "#stage", 0.4) == COLOURS["base"]
    assert colour_at(page, "#stage", 0.6) == COLOURS["tuned"]
    page.locator("#split").fill("30")
    assert colour_at(page, "#stage", 0.4) == COLOURS["tuned"]
    box = page.locator("#stage").bounding_box()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 50)
    assert page.locator("#split").input_value() == "80"
    assert colour_at(page, "#stage", 0.7) == COLOURS["base"]
    page.locator("#split").press("ArrowLeft")
    assert page.locator("#split").input_value() == "79"
    # It goes along to the next picture, unless that is the other subject itself.
    page.locator("#next").click()
    assert page.locator("#tag-right").text_content() == "tuned"
    page.locator("#next").click()
    assert not page.locator("#tag-right").is_visible()


def test_filters_and_directions(open_page, report: Path) -> None:
    page = open_page(report)
    page.get_by_role("group", name="Filter by subject").get_by_role("button", name="tuned").click()
    page.get_by_role("group", name="Filter by seed").get_by_role("button", name="1").click()
    assert shown(page) == [f"tuned: prompt {prompt}, seed 1" for prompt in PROMPTS]
    assert page.locator("#count").text_content() == "3 of 18 images"
    page.get_by_role("group", name="Filter by subject").get_by_role("button", name="tuned").click()
    assert len(shown(page)) == 9
    page.get_by_label("Rows").select_option("subject")
    assert page.get_by_label("Columns").input_value() == "prompt"
    assert page.locator("#grid tbody th").all_text_contents() == list(COLOURS)
    page.get_by_label("Shown metric").select_option("adherence")
    assert page.locator(".caption").all_text_contents() == ["0.260"] * 9


def test_a_heat_map_leads_to_its_pictures(open_page, tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", swept(tmp_path))
    page = open_page(tmp_path / "report.html")
    assert page.locator("#grid tbody th").all_text_contents() == ["4", "16"]
    assert page.locator("#grid thead th").all_text_contents() == ["0.0001", "0.001"]
    assert len(shown(page)) == 4
    # Rank and learning rate identify the subjects; their names would only repeat them.
    groups = page.locator("#filters > div").evaluate_all("all => all.map(group => group.getAttribute('aria-label'))")
    assert groups == ["Filter by prompt", "Filter by rank", "Filter by optimizer.lr"]
    cells = page.locator(".heat")
    assert [text.split()[0] for text in cells.all_inner_texts()] == ["0.000", "0.200", "0.400", "0.600"]
    assert "best" in cells.nth(3).inner_text()
    cells.nth(2).click()
    assert [label.split(":")[0] for label in shown(page)] == ["run 2"]


def vote(page, keys: str) -> None:
    names = {"l": "ArrowLeft", "r": "ArrowRight", "s": "ArrowDown", "u": "Backspace"}
    for key in keys:
        page.keyboard.press(names.get(key, key))


def votes_in(page) -> list[dict]:
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSON").click()
    return json.loads(Path(download.value.path()).read_text(encoding="utf-8"))


def test_a_blind_vote_is_kept_and_exported(open_page, open_again, report: Path) -> None:
    page = open_page(report)
    page.get_by_role("button", name="Start voting").click()
    ballot = page.locator("#ballot")
    assert page.locator("#ballot-count").text_content() == "0 answered, 18 to go"
    on_the_left = int(page.locator("#ballot-left").get_attribute("data-index"))
    vote(page, "1")
    assert not any(f" {name} " in f" {ballot.inner_text()} " for name in COLOURS)
    assert not any(name in ballot.inner_html() for name in ("tuned", "images/"))
    vote(page, "20lrs")
    assert page.locator("#ballot-count").text_content() == "6 answered, 12 to go"
    vote(page, "uu2")
    page.keyboard.press("Escape")
    exported = votes_in(page)
    assert [vote["choice"] for vote in exported["votes"]] == ["left", "right", "tie", "left", "right"]
    assert exported["votes"][0]["left"]["path"] == compared(report.parent).pictures[on_the_left].path
    for given in exported["votes"]:
        assert given["left"]["subject"] != given["right"]["subject"]
        assert (report.parent / given["left"]["path"]).is_file()
    assert sum(score["won"] for score in exported["scores"]) == 5
    assert page.locator("#scores tbody tr").count() == len(exported["scores"])
    page = open_again(page)
    assert votes_in(page)["votes"] == exported["votes"]
    page.get_by_role("button", name="Continue voting").click()
    assert page.locator("#ballot-count").text_content() == "5 answered, 13 to go"
    vote(page, "s" * 13)
    assert page.locator("#ballot-count").text_content() == "All pairs are answered."
    vote(page, "1u")
    assert page.locator("#ballot-count").text_content() == "17 answered, 1 to go"


def test_sides_and_order_are_random_and_filters_count(open_page, report: Path) -> None:
    page = open_page(report)
    pairs = page.evaluate("Array.from({length: 20}, () => pairsToAsk()).flat()")
    lefts = sum(left < right for left, right in pairs)
    # Of 360 fair turns, within five standard deviations.
    assert abs(lefts - 180) < 48
    assert len({tuple(pair) for pair in pairs}) == 36
    assert len({tuple(pairs[18 * n]) for n in range(20)}) > 5
    page.get_by_role("group", name="Filter by subject").get_by_role("button", name="tuned").click()
    assert page.evaluate("pairsToAsk().length") == 0


def test_a_vote_works_where_storage_is_refused(open_page, report: Path) -> None:
    refuse = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError') }})"
    page = open_page(report, refuse)
    assert page.locator("#storage").is_visible()
    page.get_by_role("button", name="Start voting").click()
    vote(page, "12")
    page.keyboard.press("Escape")
    assert len(votes_in(page)["votes"]) == 2
    page.locator("#theme").click()


def likelihood(strengths: np.ndarray, wins: np.ndarray) -> float:
    """Minus the logarithm; with one draw of each against strength 0."""
    differences = strengths[:, None] - strengths[None]
    draws = np.logaddexp(0, -strengths) + np.logaddexp(0, strengths)
    return float((wins * np.logaddexp(0, -differences)).sum() + 0.5 * draws.sum())


def reference(wins: np.ndarray) -> np.ndarray:
    """Score, low and high of each, by a general optimiser and the curvature by finite differences."""
    n = len(wins)
    best = minimize(likelihood, np.zeros(n), args=(wins,), method="BFGS", options={"gtol": 1e-9}).x
    steps = 1e-3 * np.eye(n)

    def curved(a: np.ndarray, b: np.ndarray) -> float:
        corners = (a + b, 1), (a - b, -1), (b - a, -1), (-a - b, 1)
        return sum(sign * likelihood(best + shift, wins) for shift, sign in corners) / 4e-6

    curvature = np.array([[curved(a, b) for b in steps] for a in steps])
    centre = np.eye(n) - 1 / n
    spread = 1.959964 * np.sqrt(np.diag(centre @ np.linalg.inv(curvature) @ centre))
    score = best - best.mean()
    return np.stack([score, score - spread, score + spread], axis=1)


def test_scores_are_those_of_bradley_and_terry(open_page, report: Path) -> None:
    page = open_page(report)
    rng = np.random.default_rng(0)
    many = rng.integers(0, 9, (5, 5)) * (1 - np.eye(5))
    halves = np.array([[0, 2.5, 1], [0.5, 0, 0], [3, 0, 0]])
    # Who won all votes is strong, not infinitely so.
    certain = np.array([[0.0, 40], [0, 0]])
    for wins in (many, halves, certain, np.zeros((3, 3))):
        scores = page.evaluate("wins => bradleyTerry(wins)", wins.tolist())
        ours = np.array([[score["score"], score["low"], score["high"]] for score in scores])
        assert ours == pytest.approx(reference(wins), abs=2e-4)
    # By hand, for one vote each: the information is 2/4 between them and 1/4 from each draw, (0.75 -0.5; -0.5 0.75),
    # its inverse (2.4 1.6; 1.6 2.4), and half of the difference varies by (2.4 + 2.4 - 2 * 1.6) / 4.
    (first, second) = page.evaluate("bradleyTerry([[0, 1], [1, 0]])")
    assert (first["score"], second["score"]) == (0, 0)
    assert first["high"] == pytest.approx(1.959964 * np.sqrt(0.4), rel=1e-9)


def background(page) -> int:
    """Brightness of the paper, 0 to 255."""
    return int(page.evaluate("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0])


def test_light_and_dark(open_page, open_again, report: Path) -> None:
    page = open_page(report, color_scheme="dark")
    assert background(page) < 40
    page.get_by_role("button", name="Switch to the light theme").click()
    assert background(page) > 220
    page = open_again(page)
    assert background(page) > 220
    assert background(open_page(report, color_scheme="light")) > 220


def test_a_phone_shows_all_without_scrolling_sideways(open_page, report: Path) -> None:
    page = open_page(report, viewport=PHONE, has_touch=True, is_mobile=True)
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) == PHONE["width"]
    grid = page.locator("#grid")
    assert grid.evaluate("box => box.scrollWidth > box.clientWidth")
    heading = page.locator("#grid tbody th").first
    before = heading.bounding_box()["x"]
    grid.evaluate("box => { box.scrollLeft = 120 }")
    assert heading.bounding_box()["x"] == before
    page.locator('.picture[data-index="0"]').tap()
    page.locator("#other").select_option("tuned")
    assert page.locator("#large").evaluate("box => box.scrollWidth <= box.clientWidth")
    stage, below = (page.locator(name).bounding_box() for name in ("#stage", "#large-subject"))
    assert stage["width"] > 300
    assert below["y"] >= stage["y"] + stage["height"]
    page.locator("#close").tap()
    page.get_by_role("button", name="Start voting").tap()
    assert page.locator("#ballot").evaluate("box => box.scrollWidth <= box.clientWidth")
    page.locator(".choice").first.tap()
    assert page.locator("#ballot-count").text_content().startswith("1 answered")


def test_pictures_load_when_they_come_into_view(open_page, tmp_path: Path) -> None:
    results = compared(tmp_path)
    seeds = range(200)
    first = results.pictures[0]
    many = [replace(first, axes={"prompt": PROMPTS[0], "seed": seed}) for seed in seeds]
    axes = {"prompt": PROMPTS[:1], "seed": seeds}
    write_page(tmp_path / "report.html", replace(results, axes=axes, pictures=many, subjects=results.subjects[:1]))
    page = open_page(tmp_path / "report.html")
    loaded = page.locator(".picture img[src]")
    page.wait_for_function("document.querySelector('.picture img').src.length > 0")
    assert loaded.count() < 100
    last = page.locator(".picture img").last
    last.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('.picture:last-child img').src.length > 0")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert loaded.count() == len(seeds)


def test_the_policy_stops_what_is_not_the_pages_own(browser, report: Path) -> None:
    """Should text ever become markup, it still cannot act."""
    page = browser.new_page()
    page.goto(report.as_uri())
    stopped = []
    page.on("console", lambda message: stopped.append(message.text))
    page.evaluate(
        """() => {
        const script = document.createElement("script");
        script.textContent = "window.acted = 1";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", '<img src="x:" onerror="window.acted = 2">');
        document.body.insertAdjacentHTML("beforeend", '<img src="https://example.org/x.png">');
        return new Promise((resolve) => setTimeout(resolve, 200));
    }"""
    )
    assert page.evaluate("window.acted") is None
    assert sum("Content Security Policy" in line for line in stopped) >= 3
    page.close()
