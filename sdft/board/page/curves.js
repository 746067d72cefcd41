// Curves over the steps: raw values faint, smoothed ones drawn above them, and one cursor for all charts.

const charts = [];
let smoothing = 0.6;
/** The step under the pointer; null away from the charts, which then show their last values. */
let cursor = null;

/** The exponential average of a curve, corrected for its start; weight 0 changes nothing. */
function smoothed(values, weight) {
  let [sum, total] = [0, 0];
  return values.map((value) => {
    sum = sum * weight + value * (1 - weight);
    total = total * weight + 1 - weight;
    return total > 0 ? sum / total : value;
  });
}

/**
 * A chart as a figure. lines: [{label, look, curve: {x, y, low, high}, smooth}]; `smooth` lines follow the slider.
 * write: how a value is written in the legend. log: logarithmic, for values over several powers of ten.
 * range: {steps, low, high} that the axes have, instead of those of the lines.
 */
function chart({ title, note = "", lines, write = number, log = false, range = null }) {
  const [legend, plot] = [make("div", { className: "legend" }), make("div", { className: "plot" })];
  const one = { lines, write, log, range, legend, plot };
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", title);
  new ResizeObserver(() => drawChart(one)).observe(plot);
  plot.addEventListener("pointermove", (event) => point(one, event));
  plot.addEventListener("pointerdown", (event) => point(one, event));
  plot.addEventListener("pointerleave", () => moveCursor(null));
  charts.push(one);
  return make("figure", { className: "chart" }, make("h3", { dir: "auto" }, title),
    make("p", { className: "note" }, note), legend, plot);
}

function drawCharts() {
  charts.forEach(drawChart);
}

function drawChart(one) {
  const { clientWidth: width, clientHeight: height } = one.plot;
  if (width === 0) return;
  const frame = { left: 52, right: width - 8, top: 8, bottom: height - 24 };
  const shown = one.lines.map((line) => shownLine(line, one.log));
  const { range } = one;
  const ends = range ? [0, range.steps] : [0, ...shown.map(({ x }) => x.at(-1))];
  const across = scale(ends.map((value) => ({ value })), frame.left, frame.right);
  const up = scale(range ? [{ value: range.low }, { value: range.high }] : heights(shown), frame.bottom, frame.top);
  one.across = across;
  const clip = `clip-${charts.indexOf(one)}`;
  const area = { x: frame.left, y: frame.top - 4, width: Math.max(0, frame.right - frame.left + 4), height: frame.bottom - frame.top + 8 };
  const marks = shown.map((line) => lineMarks(line, across, up));
  one.plot.replaceChildren(draw("svg", { width, height, "aria-hidden": "true" },
    draw("clipPath", { id: clip }, draw("rect", area)),
    axes(across, up, frame, one), draw("g", { "clip-path": `url(#${clip})` }, marks), cursorLine(one, frame)));
  showLegend(one);
}

/** A line as it is drawn: raw and smoothed values, as logarithms on a logarithmic chart. */
function shownLine({ curve, look, smooth }, log) {
  const to = log ? (value) => Math.log10(Math.max(value, 1e-12)) : (value) => value;
  const weight = smooth ? smoothing : 0;
  const calm = smoothed(curve.y, weight);
  return {
    x: curve.x, look, isSmooth: weight > 0, raw: curve.y.map(to), y: calm.map(to),
    low: curve.low?.map(to), high: curve.high?.map(to),
  };
}

/** The heights that a chart must show: all smoothed values, and raw ones without the few that are far off. */
function heights(shown) {
  const values = shown.flatMap(({ y, raw, low, high }) => {
    const sorted = [...(low ?? raw), ...(high ?? raw)].sort((a, b) => a - b);
    const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
    const ends = sorted.length > 20 ? [at(0.01), at(0.99)] : [sorted[0], sorted.at(-1)];
    return [...y, ...ends];
  });
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const least = 0.02 * Math.abs(high);  // less than that is no change that one should see
  const missing = Math.max(0, least - (high - low)) / 2;
  return [{ value: low - missing }, { value: high + missing }];
}

function lineMarks({ x, y, raw, low, high, look, isSmooth }, across, up) {
  const place = (values) => (step, i) => `${across.to(step).toFixed(1)},${up.to(values[i]).toFixed(1)}`;
  const path = (values) => x.map(place(values)).join(" ");
  const parts = [];
  if (low) parts.push(draw("polygon", { class: "band", points: `${path(low)} ${x.map(place(high)).reverse().join(" ")}` }));
  else if (isSmooth) parts.push(draw("polyline", { class: "raw", points: path(raw) }));
  parts.push(draw("polyline", { class: "curve", points: path(y) }));
  if (x.length <= 30) parts.push(...x.map((step, i) =>
    draw("circle", { class: "point", cx: across.to(step), cy: up.to(y[i]), r: isSmooth ? 1.5 : 2.5 })));
  return draw("g", { class: look }, parts);
}

function axes(across, up, frame, { log }) {
  const every = (ticks, most) => ticks.filter((_, i) => i % Math.ceil(ticks.length / most) === 0);
  const steps = every(across.ticks.filter((tick) => tick >= 0 && Number.isInteger(tick)), Math.max(2, (frame.right - frame.left) / 60));
  const rows = every(log ? up.ticks.filter((t) => Number.isInteger(t) || up.ticks.length < 4) : up.ticks, 5);
  const text = (tick) => (log ? brief(10 ** tick) : brief(tick, up.digits));
  return [
    ...rows.flatMap((tick) => [line("ruled", frame.left, up.to(tick), frame.right, up.to(tick)),
      draw("text", { x: frame.left - 6, y: up.to(tick) + 4, "text-anchor": "end", class: "tick" }, text(tick))]),
    ...steps.map((tick) => draw("text", { x: across.to(tick), y: frame.bottom + 18, "text-anchor": "middle", class: "tick" },
      brief(tick, 0))),
  ];
}

/** A number in at most seven characters. */
function brief(value, digits = 2) {
  const size = Math.abs(value);
  if (size >= 1e5) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size > 0 && size < 1e-3) return Number(value.toPrecision(2)).toExponential().replace("-", "−");
  return size < 1 && digits > 3 ? String(Number(value.toPrecision(2))) : fixed(value, Math.min(digits, 4));
}

/** A number with three or four significant digits. */
function number(value) {
  if (!Number.isFinite(value)) return NONE;
  const size = Math.abs(value);
  if (size > 0 && (size < 1e-3 || size >= 1e6)) return Number(value.toPrecision(3)).toExponential().replace("-", "−");
  return fixed(value, size === 0 ? 0 : Math.max(0, (size < 1 ? 2 : 3) - Math.floor(Math.log10(size))));
}

function cursorLine({ across }, frame) {
  const x = cursor === null ? -10 : across.to(cursor);
  return line(x < frame.left - 1 || x > frame.right + 1 ? "cursor away" : "cursor", x, frame.top, x, frame.bottom);
}

function point(one, { clientX }) {
  const { left, width } = one.plot.getBoundingClientRect();
  const share = (clientX - left - 52) / Math.max(1, width - 60);
  const steps = one.lines[0].curve.x;
  const [from, to] = [one.across.to(0), one.across.to(steps.at(-1))];
  const step = (steps.at(-1) * (clientX - left - from)) / Math.max(1, to - from);
  moveCursor(share < -0.02 ? null : steps.reduce((best, x) => (Math.abs(x - step) < Math.abs(best - step) ? x : best)));
}

function moveCursor(step) {
  if (step === cursor) return;
  cursor = step;
  for (const one of charts) {
    if (!one.across) continue;
    const [mark, svg] = [one.plot.querySelector(".cursor"), one.plot.querySelector("svg")];
    const x = cursor === null ? -10 : one.across.to(cursor);
    const away = x < 51 || x > svg.clientWidth - 6;
    mark.setAttribute("x1", away ? -10 : x);
    mark.setAttribute("x2", away ? -10 : x);
    showLegend(one);
  }
}

/** Each line with its value at the cursor, else its last one. */
function showLegend({ lines, write, legend }) {
  const entries = lines.map(({ label, look, curve, smooth }) => {
    const values = smoothed(curve.y, smooth ? smoothing : 0);
    const before = cursor === null ? curve.x.length : curve.x.findLastIndex((x) => x <= cursor) + 1;
    const value = before > 0 ? values[before - 1] : NaN;
    const key = lines.length > 1 ? make("span", { className: `key ${look}` }) : null;
    return make("span", {}, key, label && `${label} `, make("b", {}, write(value)));
  });
  const step = cursor === null ? null : make("span", {}, `step ${Math.round(cursor)}`);
  legend.replaceChildren(...entries, ...(step ? [step] : []));
}
