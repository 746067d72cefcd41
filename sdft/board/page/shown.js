// The sections of the page of a run: which curves there are, previews, files, settings.

const run = JSON.parse(at("run").textContent);
const curves = new Map(Object.entries(run.curves));

/** Unhides a section and fills its list, if there is something to show. */
function section(id, list, children) {
  const found = children.flat().filter((child) => child !== null);
  at(id).hidden = found.length === 0;
  at(list).replaceChildren(...found);
}

function has(...names) {
  return names.some((name) => curves.has(name));
}

/** Lines of those of the names that were recorded; names: [name, label] pairs. */
function linesOf(names, smooth) {
  const found = names.filter(([name]) => curves.has(name));
  return found.map(([name, label], i) => ({ label, look: LOOKS[i % LOOKS.length], curve: curves.get(name), smooth }));
}

function single(name, smooth = true) {
  const [title, note] = NAMES[name] ?? [name, ""];
  return has(name) ? chart({ title, note, lines: linesOf([[name, ""]], smooth) }) : null;
}

function begins(prefix) {
  return [...curves.keys()].filter((name) => name.startsWith(prefix));
}

function showCurves() {
  const [loss, error] = ["train/loss", "train/eps_mse"].map((name) => curves.get(name));
  const isWeighted = error && loss && error.y.some((value, i) => value !== loss.y[i]);
  const known = new Set(["train/loss", "val/eps_mse", "train/eps_mse", "train/prior", "train/accuracy", "train/gradient_norm", "val/loss"]);
  const others = [...curves.keys()].filter((name) => !known.has(name) && !/^(watch|rate|speed|memory|timestep)\//.test(name));
  section("curves", "curve-list", [
    single("train/loss"), single(has("val/eps_mse") ? "val/eps_mse" : "val/loss", false), byTimestep(),
    isWeighted ? single("train/eps_mse") : null,
    single("train/prior"), single("train/accuracy"), others.map((name) => single(name)),
  ]);
}

function byTimestep() {
  const names = begins("timestep/").sort((a, b) => Number(a.slice(9)) - Number(b.slice(9)));
  const lines = names.map((name) => ({
    label: `${name.slice(9)}–${Number(name.slice(9)) + 200}`, look: `hue-${Number(name.slice(9)) / 200}`, curve: curves.get(name), smooth: true,
  }));
  if (lines.length === 0) return null;
  return chart({
    title: "Training loss by timestep",
    note: "0 is a nearly clean picture, where details are learnt, 1000 is noise, where composition is. Logarithmic.",
    lines, log: lines.every(({ curve }) => curve.y.every((value) => value > 0)),
  });
}

function showWatch() {
  const names = begins("watch/");
  const plain = (name) => name.slice("watch/".length);
  const place = (name) => (Object.hasOwn(WATCHED, plain(name)) ? Object.keys(WATCHED).indexOf(plain(name)) : Infinity);
  section("watch", "watch-list", [...names].sort((a, b) => place(a) - place(b) || 0).map((name) => chart({
    title: plain(name).replaceAll("_", " "),
    note: place(name) < Infinity ? WATCHED[plain(name)] : "",
    lines: linesOf([[name, ""]], false),
  })));
}

function showHealth() {
  const rates = begins("rate/").map((name) => [name, name.slice(5)]);
  section("health", "health-list", [
    rates.length ? chart({ title: "Learning rate", note: rates.length > 1 ? "Of each part." : "", lines: linesOf(rates, false) }) : null,
    single("train/gradient_norm"),
    has("speed/seconds") ? chart({ title: "Time of a step", note: "The median of the latest steps.", lines: linesOf([["speed/seconds", ""]], false), write: duration }) : null,
    has("memory/now") ? chart({ title: "Memory", note: run.device_note, lines: linesOf([["memory/now", "now"], ["memory/most", "most so far"]], false), write: GIB }) : null,
  ]);
}

let shownStep = null;

function showPreviews() {
  const previews = run.previews;
  if (previews === null || previews.steps.length === 0) return;
  at("previews").hidden = false;
  at("previews-note").textContent = previews.grids ? "Base model above, after the step below."
    : "The same prompts and seeds: the base model on the left, the model of the step on the right.";
  const last = previews.steps.length - 1;
  const slider = make("input", { type: "range", className: "long", id: "step", min: 0, max: last, value: last });
  slider.setAttribute("aria-label", "Step of the pictures");
  slider.disabled = last === 0;
  const label = make("b", { id: "step-name" });
  at("steps").replaceChildren(make("label", {}, "Step ", slider, label));
  const show = () => {
    shownStep = Number(slider.value) === last ? null : previews.steps[slider.value].step;
    label.textContent = String(previews.steps[slider.value].step);
    fillPreviews(previews, previews.steps[slider.value]);
  };
  slider.addEventListener("input", show);
  show();
}

function fillPreviews(previews, { step, pictures }) {
  at("preview-list").classList.toggle("whole", previews.grids);
  if (previews.grids) {
    const grid = shot(pictures[0], "", `Pictures after step ${step}`);
    grid.classList.add("wide-shot");
    at("preview-list").replaceChildren(grid);
    return;
  }
  at("preview-list").replaceChildren(...pictures.map((picture, i) => {
    const { prompt = "", seed = null } = previews.prompts[i] ?? {};
    return make("figure", {},
      make("div", { className: "pair" }, shot(previews.base[i], "base", `base model: ${prompt}`), shot(picture, `step ${step}`, `step ${step}: ${prompt}`)),
      make("figcaption", { dir: "auto" }, prompt || "(empty prompt)", seed === null ? null : make("small", {}, `seed ${seed}`)));
  }));
}

function showTrainingPictures() {
  const pictures = run.training_pictures;
  at("training-note").textContent = pictures.length === 1 ? "One of them, with its caption." : `${pictures.length} of them, with their captions.`;
  at("training-list").classList.add("small");
  section("training", "training-list", pictures.map(({ key, captions, thumbnail }) =>
    make("figure", { title: key }, shot(thumbnail, "", key), make("figcaption", { dir: "auto" }, captions.map((text) => make("div", {}, text || "(no caption)"))))));
}

function figure({ name, value }) {
  if (value === null) return NONE;
  if (name.endsWith("seconds")) return duration(value);
  return Number.isInteger(value) && value > 1 ? value.toLocaleString("en") : number(value);
}

function showResult() {
  const { verdict, before_after: picture, choice } = run;
  at("result").hidden = verdict.length === 0 && picture === null && choice === null;
  if (choice) {
    at("choice").hidden = false;
    const { recommended: file, reason } = choice;
    at("choice").replaceChildren(...(file === null ? ["No checkpoint is recommended: "]
      : ["Recommended: ", make("a", { href: pathTo(file) }, file), ". "]),
    make("span", { dir: "auto" }, reason.charAt(0).toUpperCase() + reason.slice(1)));
  }
  const matters = ({ note, meaning }) => note !== "" || meaning !== "";
  at("verdict").replaceChildren(...verdict.filter(matters).map((one) => make("div", {},
    make("dt", {}, one.name.replaceAll("_", " ")),
    make("dd", {}, figure(one), make("small", { className: "note", dir: "auto" }, one.note || one.meaning)))));
  const others = verdict.filter((one) => !matters(one));
  at("more-figures").hidden = others.length === 0;
  at("figure-list").replaceChildren(...terms(others.map((one) => [one.name.replaceAll("_", " "), figure(one)])));
  if (picture) {
    const image = shot(picture, "", "The same prompts and seeds: base model above, tuned model below");
    image.classList.add("wide-shot");
    at("before-after").replaceChildren(image);
  }
}

function showFiles() {
  const head = make("tr", {}, ["file", "size", "what to do with it"].map((text) => make("th", { scope: "col" }, text)));
  const rows = run.files.map(({ path, bytes, use }) => make("tr", {},
    make("th", { scope: "row" }, make("a", { href: pathTo(path) }, path)), make("td", {}, cost("bytes", bytes)), make("td", {}, use)));
  section("files", "file-list", rows.length ? [make("table", {}, make("thead", {}, head), make("tbody", {}, rows))] : []);
}

/** What was forecast, and what became of it. */
function showPlan() {
  const { forecast, early, seconds, most_gib: most, on_gpu: onGpu } = run.plan;
  const memory = onGpu ? forecast.device_gib : forecast.host_gib;
  const soFar = run.state.what === "training" ? " so far" : "";
  const rows = [];
  if (forecast.train_seconds !== null) rows.push(["time of training", duration(forecast.train_seconds), "without validation and previews"]);
  if (early) rows.push(["time of training", duration(early.seconds), `at the pace of its first ${early.steps.toLocaleString("en")} steps`]);
  if (memory !== null) rows.push([onGpu ? "memory of the GPU" : "memory of the machine", GIB(memory), "by the shapes of its tensors"]);
  const real = ([what]) => (what === "time of training" ? seconds === null ? NONE : duration(seconds) + soFar
    : most === undefined || most === null ? NONE : GIB(most) + soFar);
  at("plan").hidden = run.lines.length === 0 && rows.length === 0;
  at("lines").textContent = run.lines.join("\n");
  at("forecast").replaceChildren(...(rows.length === 0 ? [] : [plainTable(["", "forecast", "became", "the forecast is"],
    rows.map((row) => [row[0], row[1], real(row), row[2]]))]));
  if (memory === null) {
    at("more").replaceChildren("The forecast of memory is added by ", make("code", {}, `python -m sdft.board ${run.folder} forecast=true`));
  }
}

function showSettings() {
  at("settings").hidden = run.config.length === 0;
  at("overrides").replaceChildren(
    make("p", { className: "note" }, run.overrides.length ? "What was set on the command line:" : "Nothing was set on the command line."),
    make("ul", { className: "words" }, run.overrides.map((word) => make("li", {}, make("code", { dir: "auto" }, word)))));
  at("config-list").replaceChildren(...terms(run.config));
}
