"""The page of a run: made of the files of its folder, opened from disk by a real browser."""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from pathlib import Path

import pytest
from run_folders import ALERT, RESUME, draw, finish, noise, write_history, write_run

from sdft.board.previews import MOST_STEPS, previews_of
from sdft.board.run_page import run_data, write_run_page
from sdft.pages import html

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[dev]'")
PHONE = {"width": 390, "height": 844}
PROMPTS = ["a photo of a cat", ALERT]


def embedded(page: Path) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="run">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


def until(page, true: str) -> None:
    """Waits. Not by `wait_for_function`, which evaluates a text in the page: its policy forbids that."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with suppress(sync_api.Error):  # it may be loading itself again
            if page.evaluate(true):
                return
        page.wait_for_timeout(100)
    raise AssertionError(true)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, with texts that could be taken for markup everywhere."""
    run = tmp_path_factory.mktemp("a run #1 100%")
    history = write_history(run, 400)
    write_run(run, PROMPTS, [100, 200, 300], caption=ALERT)
    small = html.thumbnail(html.Image.new("RGB", (8, 8)), 64)
    told = [{"key": ALERT, "captions": [ALERT, ""], "thumbnail": small}]
    (run / "training_pictures.json").write_text(json.dumps(told))
    (run / "choice.json").write_text(json.dumps({"recommended": "lora.safetensors", "reason": ALERT}))
    finish(run, history, 400, style_gain=0.9)
    write_run_page(run)
    return run


@pytest.fixture
def going(tmp_path: Path) -> Path:
    """The folder of a run at step 260 of 400."""
    run = tmp_path / "going"
    write_history(run, 400, 260)
    write_run(run, PROMPTS[:1] * 8, [100, 200])
    write_run_page(run, every=1)
    return run


def test_what_a_user_wrote_is_data_and_not_markup(finished: Path) -> None:
    text = (finished / "index.html").read_text(encoding="utf-8")
    assert len(re.findall("<script|</script|<!--", text)) == 4
    data = embedded(finished / "index.html")
    assert [prompt["prompt"] for prompt in data["previews"]["prompts"]] == PROMPTS
    assert data["overrides"] == [f"caption={ALERT}"]
    assert data["training_pictures"][0]["captions"] == [ALERT, ""]
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)


def test_a_finished_run_shows_its_verdict_files_and_curves(open_page, finished: Path) -> None:
    page = open_page(finished / "index.html")
    assert page.locator("#state").inner_text() == "Finished: step 400 of 400."
    assert page.locator("#choice").inner_text().startswith("Recommended: lora.safetensors. </script>")
    assert page.locator("#verdict dt").all_inner_texts() == ["style gain", "train seconds"]
    files = page.locator("#file-list tbody th").all_inner_texts()
    assert files[:2] == ["lora.safetensors", "before_after.png"]
    assert page.locator("#file-list a").first.evaluate("link => link.href") == (finished / "lora.safetensors").as_uri()
    titles = page.locator(".chart h3").all_inner_texts()
    assert titles == ["Training loss", "Error on held-out pictures", "Training loss by timestep", "adherence",
                      "Learning rate", "Gradient norm", "Time of a step", "Memory"]  # fmt: skip
    assert page.locator(".chart .curve").count() == 13
    assert page.locator("#training-list figcaption").inner_text().startswith(ALERT[:9])
    assert page.locator("#warnings li").all_inner_texts() == ["left out: 3.png (broken)"]
    assert page.locator("script").count() == 2
    assert page.locator("#alarm").is_hidden()


def test_the_slider_leads_through_the_previews_beside_the_base(open_page, finished: Path) -> None:
    page = open_page(finished / "index.html")
    shown = page.locator("#preview-list img")
    assert shown.evaluate_all("all => all.map(image => image.alt)")[:2] == [
        "base model: a photo of a cat", "step 300: a photo of a cat",
    ]  # fmt: skip
    page.locator("#step").fill("0")
    assert page.locator("#step-name").inner_text() == "100"
    assert shown.nth(1).get_attribute("alt") == "step 100: a photo of a cat"
    assert page.locator("#preview-list figcaption").nth(1).inner_text() == f"{ALERT}\nseed 1"


def test_the_slider_smooths_and_the_pointer_reads_the_curves(open_page, finished: Path) -> None:
    page = open_page(finished / "index.html")
    curve = page.locator(".chart .curve").first
    before = curve.get_attribute("points")
    page.locator("#smooth").fill("0.9")
    assert curve.get_attribute("points") != before
    page.locator("#smooth").fill("0")
    plot = page.locator(".plot").first
    plot.hover(position={"x": plot.bounding_box()["width"] / 2, "y": 50})
    page.locator(".legend", has_text="step").first.wait_for()
    legend = page.locator(".legend").first.inner_text()
    step = int(re.search(r"step (\d+)", legend)[1])
    assert 150 < step < 250
    assert "adherence" not in legend
    assert f"step {step}" in page.locator("#watch .legend").inner_text(), "all charts follow"


@pytest.mark.slow
def test_a_page_of_a_run_that_goes_on_loads_itself_again_and_keeps_what_was_set(open_page, going: Path) -> None:
    page = open_page(going / "index.html", viewport={"width": 800, "height": 500})
    assert re.match(r"Training: step 260 of 400, about 1\d s left", page.locator("#state").inner_text())
    page.locator("#step").fill("0")
    page.locator("#smooth").fill("0.8")
    page.locator("#config summary").click()
    page.get_by_role("button", name="Switch to the dark theme").click()
    page.evaluate("scrollTo({ top: 600, behavior: 'instant' })")
    page.evaluate("window.old = true")
    write_history(going, 400, 400)
    write_run_page(going, every=1)
    until(page, "window.old === undefined && document.title.startsWith('100 %') && scrollY > 0")
    assert page.evaluate("scrollY") == 600
    assert page.locator("#step-name").inner_text() == "100"
    assert page.locator("#smooth").input_value() == "0.8"
    assert page.locator("#config").evaluate("details => details.open")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.slow
def test_the_latest_previews_are_followed_and_an_ended_run_is_not_loaded_again(open_page, going: Path) -> None:
    page = open_page(going / "index.html")
    assert page.locator("#step-name").inner_text() == "200"
    history = write_history(going, 400)
    draw(going / "previews" / "step_000300" / "00.png", (9, 9, 9))
    finish(going, history, 400)
    write_run_page(going, every=1)
    until(page, "document.title === 'going'")
    assert page.locator("#step-name").inner_text() == "300"
    page.evaluate("window.old = true")
    page.wait_for_timeout(2500)
    assert page.evaluate("window.old")


def test_a_page_without_news_says_so(open_page, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    write_history(run, 400, 260, began=time.time() - 1000)
    page = open_page(write_run_page(run, every=1))
    assert page.locator("#alarm").inner_text().startswith("No news for 16 min: the run may have been killed.")
    assert RESUME in page.locator("#alarm").inner_text()
    assert open_page(write_run_page(run), "Date.now = () => 0").locator("#alarm").is_hidden()


def test_files_that_are_not_what_they_should_be_make_a_page(open_page, tmp_path: Path) -> None:
    write_history(tmp_path, 400, 260).values(260, {"train/loss": 1.0})
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"time": 1, "step": 270, "values": {"train/loss": NaN}}\n')
    (tmp_path / "summary.json").write_text('{"style_gain": NaN, "artifacts": [], "num_steps": "x", "a": {}}')
    for name in ("receipt.json", "choice.json", "training_pictures.json", "forecast.json", "watch/measurements.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('[{"x": [null]}, 1]')
    assert open_page(write_run_page(tmp_path)).locator(".chart").count() > 5


def test_a_failed_run_says_why(open_page, tmp_path: Path) -> None:
    write_history(tmp_path, 400, 260).end("failed", ALERT)
    page = open_page(write_run_page(tmp_path))
    assert page.locator("#state").inner_text() == "Failed at step 260 of 400."
    assert page.locator("#alarm").inner_text().startswith(ALERT[:30])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(open_page, finished: Path, scheme: str) -> None:
    page = open_page(finished / "index.html", color_scheme=scheme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = int(paper.split("(")[1].split(",")[0])
    assert (brightness > 220) == (scheme == "light")


def test_a_phone_shows_all_without_scrolling_sideways(open_page, finished: Path) -> None:
    page = open_page(finished / "index.html", viewport=PHONE, has_touch=True, is_mobile=True)
    page.locator("#config summary").tap()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.locator(".plot").first.bounding_box()["width"] > 340


@pytest.mark.slow
def test_a_long_run_with_previews_is_a_small_page_that_opens_at_once(browser, tmp_path: Path) -> None:
    write_history(tmp_path, 20_000)
    write_run(tmp_path, [f"a cat in the snow number {n}" for n in range(6)], list(range(500, 20_001, 500)), noise)
    path = write_run_page(tmp_path)
    assert path.stat().st_size < 3_000_000
    data = embedded(path)
    steps = [one["step"] for one in data["previews"]["steps"]]
    assert (steps[0], steps[-1]) == (500, 20_000)
    assert 8 <= len(steps) <= MOST_STEPS
    page = browser.new_page()
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})  # of its thread alone: other tests are running
    page.goto(path.as_uri())
    figures = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    page.close()
    assert 0.01 < figures["TaskDuration"] < 1.0


def test_grids_of_earlier_versions_are_shown_whole(open_page, tmp_path: Path) -> None:
    for step in (100, 200):
        draw(tmp_path / "previews" / f"step_{step:06d}.png", (30, step, 30), 256)
    page = open_page(write_run_page(tmp_path))
    assert page.locator("#preview-list img").get_attribute("alt") == "Pictures after step 200"
    assert page.locator("#state").inner_text() == "This folder has no record of a run."


def test_a_picture_that_is_missing_or_half_written_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, ["a", "b"], [100])
    (tmp_path / "previews" / "step_000100" / "01.png").write_bytes(b"\x89PNG")
    (tmp_path / "previews" / "base" / "00.png").unlink()
    found = previews_of(tmp_path)
    assert found is not None
    assert [bool(one) for one in found["base"]] == [False, True]
    assert [bool(one) for one in found["steps"][0]["pictures"]] == [True, False]


def test_what_was_measured_on_pictures_has_an_interval_from_the_base_on(tmp_path: Path) -> None:
    write_history(tmp_path, 100)
    (tmp_path / "watch").mkdir()
    lines = [{"step": 0, "values": {"adherence": [1, 1]}}, {"step": 40, "values": {"adherence": [0.5, 0.7]}}, "broken"]
    (tmp_path / "watch" / "measurements.jsonl").write_text("\n".join(map(json.dumps, lines)))
    curve = run_data(tmp_path)["curves"]["watch/adherence"]
    assert (curve["x"], curve["y"], curve["low"][0]) == ([0, 40], [1.0, 0.6], 1.0)
    assert curve["high"][1] == pytest.approx(0.6 + 12.706 * 0.1, rel=1e-3)  # Student's t with one degree of freedom
