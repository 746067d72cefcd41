// The tables: metrics with intervals and costs, differences as sentences, what was compared.

const LEVEL = 0.05;
const ARROWS = { higher: "↑ higher is better", lower: "↓ lower is better" };

function figureOf(subject, metric) {
  return figures.get(subject)?.get(metric);
}

/** The highest or lowest value, whichever is better; null if the metric has no direction. */
function bestOf(metric, values) {
  const known = values.filter(Number.isFinite);
  if (known.length < 2 || metric.better === null) return null;
  return metric.better === "higher" ? Math.max(...known) : Math.min(...known);
}

function bestMark() {
  return [" ", make("span", { className: "best" }, "best")];
}

function showFigures() {
  const isMeasured = ({ name }) => [...subjects.keys()].some((subject) => figureOf(subject, name));
  const measured = [...metrics.values()].filter(isMeasured);
  const keysOf = (field) => [...new Set(results.subjects.flatMap((subject) => Object.keys(subject[field])))];
  const columns = [
    ...keysOf("varied").map(variedColumn),
    ...measured.map(metricColumn),
    ...keysOf("cost").map(costColumn),
  ];
  if (columns.length === 0) return;
  at("figures").hidden = false;
  at("figure-table").replaceChildren(sortableTable(columns, results.subjects, "subject", ({ name }) => [name]));
  at("meanings").replaceChildren(...terms(measured.map(({ label, meaning, better }) =>
    [label, `${meaning} ${better ? `${ARROWS[better]}.` : "Neither direction is better."}`])));
}

/** A column of the metrics table: heading, value of a subject to sort by, content of its cell. */
function variedColumn(name) {
  const value = (subject) => (Object.hasOwn(subject.varied, name) ? subject.varied[name] : null);
  return { label: name, hint: "", value, cell: (subject) => [written(value(subject))] };
}

function costColumn(name) {
  const value = (subject) => (Object.hasOwn(subject.cost, name) ? subject.cost[name] : null);
  return { label: name, hint: "cost", value, cell: (subject) => [cost(name, value(subject))] };
}

function metricColumn(metric) {
  const row = results.subjects.map(({ name }) => figureOf(name, metric.name)).filter((estimate) => estimate);
  const ends = row.flatMap(({ value, low, high }) => [value, low, high]).filter(Number.isFinite);
  const digits = decimals(ends);
  const best = bestOf(metric, row.map(({ value }) => value));
  const value = ({ name }) => figureOf(name, metric.name)?.value ?? null;
  const cell = (subject) => {
    const estimate = figureOf(subject.name, metric.name);
    if (!Number.isFinite(estimate?.value)) return [NONE];
    return [
      make("div", {}, make("b", {}, fixed(estimate.value, digits)), estimate.value === best ? bestMark() : null),
      whisker(estimate, Math.min(...ends), Math.max(...ends)),
      make("small", {}, interval(estimate, digits)),
    ];
  };
  return { label: metric.label, hint: ARROWS[metric.better] ?? "", title: metric.meaning, value, cell };
}

/** The outcome of a test: a sign that is clear without its colour, and a word. */
function judged(verdict) {
  const better = metrics.get(verdict.metric)?.better ?? null;
  if (verdict.p === null || verdict.p >= LEVEL) return { sign: "=", word: "no detectable difference", kind: "same" };
  if (better === null) return { sign: "≠", word: "different", kind: "other" };
  const gained = verdict.difference.value > 0 === (better === "higher");
  return gained ? { sign: "▲", word: "better", kind: "better" } : { sign: "▼", word: "worse", kind: "worse" };
}

function showVerdicts() {
  if (results.verdicts.length === 0) return;
  at("verdicts").hidden = false;
  const lines = results.verdicts.map((verdict) => {
    const { sign, word, kind } = judged(verdict);
    const look = { className: `sign ${kind}`, title: word, role: "img", "aria-label": word };
    return make("li", {}, make("span", look, sign), make("span", { dir: "auto" }, verdict.sentence));
  });
  const heads = ["subject", "baseline", "metric", "difference", "p (Holm)", "effect size", "detectable", "pairs"];
  const rows = results.verdicts.map((v) => {
    const digits = decimals([v.difference.value, v.difference.low, v.difference.high]);
    const ends = interval(v.difference, digits);
    const difference = fixed(v.difference.value, digits) + (ends && ` (${ends})`);
    return [v.subject, v.baseline, metrics.get(v.metric)?.label ?? v.metric, difference, fixed(v.p, 3),
      fixed(v.effect, 2), fixed(v.detectable, digits), v.num_pairs];
  });
  at("verdict-list").replaceChildren(
    make("ul", { className: "verdicts" }, lines),
    make("details", {}, make("summary", {}, "Table of the tests"),
      make("div", { className: "wide" }, plainTable(heads, rows))),
  );
}

function showAbout() {
  const rows = results.subjects.map(({ name, kind, source }) => [name, kind, source]);
  at("subjects").replaceChildren(plainTable(["subject", "kind", "source"], rows));
  const shared = Object.entries(results.settings).map(([name, value]) => [name, written(value)]);
  at("shared").replaceChildren(...terms(shared));
}
