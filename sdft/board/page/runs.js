// The page of many runs: one filter for the table, the curves and the pictures.

const data = JSON.parse(at("runs").textContent);
const runs = data.runs;
/** What is drawn of each run, to be hidden with it: run -> elements. */
const drawn = new Map(runs.map((run) => [run, []]));
const LOWER = /^val\/|forgetting|seconds$/;

function stateOf({ state }) {
  const silent = state.patience !== null && Date.now() / 1000 - state.updated > state.patience;
  if (silent) return ["silent", "no news"];
  if (["training", "finishing"].includes(state.what)) return ["going", state.what];
  return [state.what, state.what];
}

function linkTo(run) {
  return make("a", { href: `./${run.path.split("/").map(encodeURIComponent).join("/")}/index.html` }, run.path);
}

function columns() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.figures)))];
  return [
    { label: "state", hint: "", value: (run) => stateOf(run)[1], cell: (run) => [stateMark(run)] },
    { label: "steps", hint: "", value: (run) => run.state.step, cell: ({ state }) => [steps(state)] },
    ...data.varied.map((key) => ({
      label: key, hint: "", value: (run) => sortable(run.varied[key]), cell: (run) => [run.varied[key] || NONE],
    })),
    ...names.map(figureColumn),
  ];
}

function figureColumn(name) {
  const values = runs.map((run) => run.figures[name]).filter(Number.isFinite);
  const digits = decimals(values);
  const best = LOWER.test(name) ? Math.min(...values) : Math.max(...values);
  const isRanked = /^(style_gain|identity|adherence|val\/eps_mse|psnr)/.test(name) && values.length > 1;
  const text = (value) => (name.endsWith("seconds") ? duration(value) : fixed(value, Math.min(digits, 4)));
  return {
    label: name.replaceAll("_", " "),
    hint: "",
    value: (run) => run.figures[name] ?? null,
    cell: (run) => {
      const value = run.figures[name];
      if (!Number.isFinite(value)) return [NONE];
      return [isRanked && value === best ? make("b", {}, text(value)) : text(value)];
    },
  };
}

/** Numbers sort as numbers. */
function sortable(text) {
  if (text === undefined || text === "") return null;
  return Number.isFinite(Number(text)) ? Number(text) : text;
}

function steps({ step, of }) {
  return of && of !== step ? `${step.toLocaleString("en")} of ${of.toLocaleString("en")}` : step.toLocaleString("en");
}

function stateMark(run) {
  const [look, word] = stateOf(run);
  return make("span", { className: `state ${look}`, title: run.state.reason }, word);
}

function showTable() {
  const table = sortableTable(columns(), runs, "run", (run) => linkTo(run));
  [...table.tBodies[0].rows].forEach((row, i) => drawn.get(runs[i]).push(row));
  at("run-table").replaceChildren(table);
}

function showCurves(name) {
  charts.length = 0;
  const shown = runs.filter((run) => Object.hasOwn(run.curves, name));
  const smooth = name.startsWith("train/");
  const range = rangeOf(shown.map((run) => run.curves[name]), smooth);
  const figures = shown.map((run) => {
    const lines = [{ label: "", look: "blue", curve: run.curves[name], smooth }];
    const figure = chart({ title: label(run), lines, range });
    figure.dataset.run = runs.indexOf(run);
    figure.title = run.path;
    return figure;
  });
  at("curve-list").replaceChildren(...figures);
  filter();
}

/** A short name of a run: what it differs in, else its folder. */
function label(run) {
  const parts = Object.entries(run.varied).filter(([, value]) => value).map(([key, value]) => `${key.split(".").at(-1)} ${value}`);
  return parts.length && parts.length <= 3 ? parts.join(", ") : run.path;
}

/** The same axes for all curves. */
function rangeOf(curves, smooth) {
  const values = curves.flatMap(({ y }) => (smooth ? smoothed(y, smoothing) : y)).sort((a, b) => a - b);
  return { steps: Math.max(...curves.map(({ x }) => x.at(-1))), low: values[0], high: values.at(-1) };
}

function showChoices() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))];
  const first = ["val/eps_mse", "watch/style_gain", "watch/identity", "train/loss"].find((name) => names.includes(name)) ?? names[0];
  at("curves").hidden = names.length === 0;
  if (names.length === 0) return;
  at("choices").replaceChildren(choice("Curve", names.map((name) => [name, name]), first, showCurves));
  showCurves(first);
}

function showPictures() {
  const shown = runs.filter((run) => run.picture !== null);
  at("pictures").hidden = shown.length === 0;
  at("picture-list").replaceChildren(...shown.map((run) => {
    const figure = make("figure", {}, shot(run.picture, "", `Pictures of ${run.path}`),
      make("figcaption", { dir: "auto" }, linkTo(run), make("small", { className: "note" }, label(run) === run.path ? "" : label(run))));
    drawn.get(run).push(figure);
    return figure;
  }));
}

function matches(run) {
  const wanted = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = [run.path, ...Object.entries(run.varied).flat(), ...stateOf(run)].join(" ").toLowerCase();
  return wanted.every((word) => text.includes(word));
}

function filter() {
  const shown = new Set(runs.filter(matches));
  for (const [run, elements] of drawn) for (const element of elements) element.hidden = !shown.has(run);
  for (const figure of at("curve-list").children) figure.hidden = !shown.has(runs[figure.dataset.run]);
  at("count").textContent = shown.size === runs.length ? "" : `${shown.size} of ${runs.length} runs`;
}

function showFilters() {
  const search = make("input", { type: "search", id: "search", placeholder: "name, setting, state" });
  search.addEventListener("input", filter);
  at("filters").replaceChildren(make("label", {}, "Show only ", search));
}

document.title = `Runs in ${data.folder}`;
at("lead").textContent = `${runs.length} run${runs.length === 1 ? "" : "s"} in ${data.folder} · written ${new Date(1000 * data.written).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })}`;
startTheme();
showFilters();
showTable();
showChoices();
showPictures();
filter();
for (const section of document.querySelectorAll("main > section:not([hidden])")) {
  at("contents").append(make("a", { href: `#${section.id}` }, section.querySelector("h2").textContent));
}
