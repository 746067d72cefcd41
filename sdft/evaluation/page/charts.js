// Charts as SVG, without a library: intervals, the trade-off with its Pareto front, heat maps.

const MANY = 12;

/** A dot with its interval on a line from `low` to `high`. */
function whisker(estimate, low, high) {
  const x = (value) => (high > low ? 3 + (94 * (value - low)) / (high - low) : 50);
  const bar = hasInterval(estimate) ? [line("interval", x(estimate.low), 5, x(estimate.high), 5)] : [];
  const dot = draw("circle", { cx: x(estimate.value), cy: 5, r: 3, class: "dot" });
  return draw("svg", { viewBox: "0 0 100 10", class: "whisker", "aria-hidden": "true" }, bar, dot);
}

function showTradeoff() {
  const tradeoff = results.tradeoff;
  if (tradeoff === null) return;
  const points = tradeoffPoints(tradeoff);
  if (points.length === 0) return;
  at("tradeoff").hidden = false;
  // In real pixels, and again for each width, so that the text stays readable on a phone.
  new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width > 0) at("plot").replaceChildren(tradeoffPlot(tradeoff, points, contentRect.width));
  }).observe(at("plot"));
}

function tradeoffPoints({ x, y, front, recommended }) {
  const point = (name) => ({
    name,
    x: figureOf(name, x),
    y: figureOf(name, y),
    front: front.includes(name),
    recommended: name === recommended,
  });
  const isMeasured = ({ x, y }) => Number.isFinite(x?.value) && Number.isFinite(y?.value);
  return [...subjects.keys()].map(point).filter(isMeasured);
}

function tradeoffPlot(tradeoff, points, width) {
  const height = Math.min(440, Math.max(280, width * 0.6));
  const frame = { left: 58, right: width - 16, top: 16, bottom: height - 50 };
  const across = scale(points.map((point) => point.x), frame.left, frame.right);
  const up = scale(points.map((point) => point.y), frame.bottom, frame.top);
  const front = points.filter((point) => point.front).sort((a, b) => a.x.value - b.x.value);
  const path = front.map((point) => `${across.to(point.x.value)},${up.to(point.y.value)}`).join(" ");
  const best = front.map(({ name }) => name).join(", ");
  const description = `${labelOf(tradeoff.y)} against ${labelOf(tradeoff.x)}; on the front: ${best}`;
  return draw("svg", { width, height, role: "img", "aria-label": description },
    axisLines(across, up, frame),
    axisName(labelOf(tradeoff.x, true), `translate(${(frame.left + frame.right) / 2} ${height - 10})`),
    axisName(labelOf(tradeoff.y, true), `translate(14 ${(frame.top + frame.bottom) / 2}) rotate(-90)`),
    draw("polyline", { points: path, class: "front" }),
    points.map((point) => mark(point, across, up)),
    labels(points, across, up, frame));
}

function labelOf(name, direction = false) {
  const metric = metrics.get(name);
  const arrow = { higher: " →", lower: " ←" }[metric?.better] ?? "";
  return (metric?.label ?? name) + (direction && arrow ? `${arrow} better` : "");
}

function mark(point, across, up) {
  const [x, y] = [across.to(point.x.value), up.to(point.y.value)];
  const bars = [];
  if (hasInterval(point.x)) bars.push(line("interval", across.to(point.x.low), y, across.to(point.x.high), y));
  if (hasInterval(point.y)) bars.push(line("interval", x, up.to(point.y.low), x, up.to(point.y.high)));
  const ring = point.recommended ? [draw("circle", { cx: x, cy: y, r: 10, class: "kept" })] : [];
  const title = draw("title", {}, `${point.name}: ${fixed(point.x.value, 4)}, ${fixed(point.y.value, 4)}`);
  const dot = draw("circle", { cx: x, cy: y, r: 5, class: "dot" });
  return draw("g", { class: point.front ? "point" : "point beaten" }, bars, ring, dot, title);
}

/** Names beside their dots, the recommended one and the front first; one without free space has only its tooltip. */
function labels(points, across, up, frame) {
  // With many points, only the front and the recommended one have names.
  const named = points.length > MANY ? points.filter((point) => point.front || point.recommended) : points;
  const taken = points.map((p) => box(across.to(p.x.value) - 7, up.to(p.y.value) - 7, 14, 14));
  const placed = [];
  const rank = (point) => (point.recommended ? 0 : point.front ? 1 : 2);
  for (const point of [...named].sort((a, b) => rank(a) - rank(b))) {
    const [x, y] = [across.to(point.x.value), up.to(point.y.value)];
    const text = point.name.length > 24 ? `${point.name.slice(0, 23)}…` : point.name;
    const wide = text.length * 7.4;
    const [right, left] = [x + 8, x - 8 - wide];
    const tries = [-22, 8, -38, 24].flatMap((off) => [box(right, y + off, wide, 14), box(left, y + off, wide, 14)]);
    const inside = (area) => area.left >= frame.left && area.right <= frame.right && area.top >= 0;
    const free = tries.find((area) => inside(area) && !taken.some((other) => overlap(area, other)));
    if (!free) continue;
    taken.push(free);
    const name = point.recommended ? "label kept-label" : "label";
    placed.push(draw("text", { x: free.left, y: free.top + 12, class: name }, text));
  }
  return placed;
}

function box(left, top, width, height) {
  return { left, top, right: left + width, bottom: top + height };
}

function overlap(a, b) {
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}

function showHeatMaps() {
  if (results.heat_maps.length === 0) return;
  at("maps").hidden = false;
  at("map-list").replaceChildren(...results.heat_maps.map(heatMap));
}

/** A table whose cells are darker for larger values; a click shows their images. */
function heatMap(map) {
  const metric = metrics.get(map.metric) ?? { label: map.metric, better: null, meaning: "" };
  const values = map.cells.map(({ value }) => value).filter(Number.isFinite);
  const [low, high, best] = [Math.min(...values), Math.max(...values), bestOf(metric, values)];
  const digits = decimals(values);
  const order = (key) => [...new Set(map.cells.map((cell) => cell[key]))].sort((a, b) =>
    (Number.isFinite(a) && Number.isFinite(b) ? a - b : String(a).localeCompare(String(b))));
  const columns = order("column");
  const square = (row, column) => {
    const cell = map.cells.find((one) => one.row === row && one.column === column);
    if (!cell || !Number.isFinite(cell.value)) return make("td", { className: "empty" }, NONE);
    const button = make("button", { type: "button", className: "heat", title: "Show its images" },
      make("b", {}, fixed(cell.value, digits)), cell.value === best ? bestMark() : null,
      make("small", {}, interval(cell, digits)));
    // At most half of the colour: the numbers stay readable in both themes.
    const heat = high > low ? (cell.value - low) / (high - low) : 0.5;
    button.style.setProperty("--heat", `${Math.round(5 + 45 * heat)}%`);
    button.addEventListener("click", () => showOnly([[map.row_name, row], [map.column_name, column]]));
    return make("td", {}, button);
  };
  const direction = ` ${ARROWS[metric.better] ?? ""}`;
  const head = make("tr", {}, make("th", {}, `${map.row_name} ↓ ${map.column_name} →`),
    columns.map((column) => make("th", { scope: "col" }, written(column))));
  const body = order("row").map((row) => make("tr", {}, make("th", { scope: "row" }, written(row)),
    columns.map((column) => square(row, column))));
  return make("div", { className: "wide" }, make("table", { className: "map" },
    make("caption", { title: metric.meaning }, make("b", {}, metric.label), direction),
    make("thead", {}, head), make("tbody", {}, body)));
}
