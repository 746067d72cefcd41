// Builds the page of a run. Runs last.

function ago(seconds) {
  return seconds < 5 ? "just now" : `${duration(Math.round(seconds))} ago`;
}

function stateText() {
  const { what, step, of, left, reason } = run.state;
  const far = of ? `step ${step.toLocaleString("en")} of ${of.toLocaleString("en")}` : `step ${step.toLocaleString("en")}`;
  switch (what) {
    case "training": return `Training: ${far}${left === null ? "" : `, about ${duration(Math.max(1, left))} left`}`;
    case "finishing": return `Training is over (${far}); the weights are being written and judged.`;
    case "finished": return `Finished: ${far}.`;
    case "stopped": return `Stopped at ${far}.`;
    case "failed": return `Failed at ${far}.`;
    default: return "This folder has no record of a run.";
  }
}

function showState() {
  document.title = `${run.state.what === "training" && run.state.of ? `${Math.floor((100 * run.state.step) / run.state.of)} % ` : ""}${run.name}`;
  at("title").textContent = run.name;
  at("state").textContent = stateText();
  const bar = at("progress");
  at("warnings").hidden = run.warnings.length === 0;
  at("warnings").replaceChildren(...run.warnings.map((line) => make("li", { dir: "auto" }, line)));
  bar.hidden = !run.state.of;
  bar.max = run.state.of || 1;
  bar.value = run.state.step;
  showNews();
}

function showNews() {
  const { updated, started, starts } = run.state;
  const when = (time) => new Date(1000 * time).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  const parts = [run.folder];
  if (started) parts.push(`started ${when(started)}${starts > 1 ? `, resumed ${starts - 1} time${starts > 2 ? "s" : ""}` : ""}`);
  if (updated) parts.push(isGoing() ? `last news ${ago(silence())}` : `ended ${when(updated)}`);
  if (isGoing() && !isSilent()) parts.push("this page loads itself again");
  at("news").textContent = parts.join(" · ");
  showAlarm();
}

function showAlarm() {
  const { what, reason, resume } = run.state;
  const said = [];
  if (isSilent()) said.push(make("p", {}, `No news for ${duration(silence())}: the run may have been killed.`));
  if (reason) said.push(make("p", { dir: "auto" }, reason));
  if (said.length > 0 || what === "stopped") {
    if (resume) said.push(make("p", {}, "To go on: ", make("code", { dir: "auto" }, resume)));
  }
  const text = said.map((line) => line.textContent).join("\n");
  if (text === at("alarm").textContent && text) return;
  at("alarm").hidden = said.length === 0;
  at("alarm").replaceChildren(...said);
}

function listContents() {
  const shown = [...document.querySelectorAll("main > section:not([hidden])")];
  at("contents").replaceChildren(...shown.map((section) =>
    make("a", { href: `#${section.id}` }, section.querySelector("h2").textContent)));
}

function buildSmoothing() {
  const slider = make("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: smoothing, id: "smooth" });
  slider.addEventListener("input", () => {
    smoothing = Number(slider.value);
    drawCharts();
  });
  at("smoothing").replaceChildren(make("label", {}, "Smoothing ", slider));
}

const before = remembered();
smoothing = before.smoothing ?? smoothing;
startTheme();
showState();
showResult();
showPreviews();
buildSmoothing();
showCurves();
showWatch();
showHealth();
showFiles();
showTrainingPictures();
showPlan();
showSettings();
listContents();
drawCharts();
restore(before);
keepFresh();
