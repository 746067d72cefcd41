// The grid of images: axes of rows and columns, filters, size, and moving with the arrow keys.

const layout = startingLayout();

/** Indices of the shown images, row by row. */
let shownRows = [];

/** Thumbnails load when they come into view: thousands would take seconds. */
const lazy = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach(({ target }) => load(target)),
  { root: at("grid"), rootMargin: "300px" },
);

function load(button) {
  showThumbnail(button.querySelector("img"), Number(button.dataset.index));
  lazy.unobserve(button);
}

/** By default a row per prompt and a column per subject; in a sweep, the two axes of its heat map for one prompt. */
function startingLayout() {
  const map = results.heat_maps.find(({ row_name, column_name }) => axes.has(row_name) && axes.has(column_name));
  if (map) {
    if (filters.has(PROMPT)) filters.get(PROMPT).add(axes.get(PROMPT).values[0]);
    return { rows: map.row_name, columns: map.column_name, figure: null };
  }
  const others = varyingAxes.filter((name) => name !== SUBJECT);
  const rows = others.includes(PROMPT) ? PROMPT : others[0];
  const columns = varyingAxes.includes(SUBJECT) ? SUBJECT : others.find((name) => name !== rows);
  return { rows: rows ?? null, columns: columns ?? null, figure: null };
}

function buildGridControls() {
  const names = [[null, "nothing"], ...varyingAxes.map((name) => [name, name])];
  const set = (key, other) => (name) => {
    // An axis cannot be rows and columns: the two are swapped.
    if (name !== null && layout[other] === name) layout[other] = layout[key];
    layout[key] = name;
    buildGridControls();
    showGrid();
  };
  const size = make("input", { type: "range", min: 48, max: 512, step: 8, value: fittingSize() });
  size.addEventListener("input", () => setSize(Number(size.value)));
  setSize(Number(size.value));
  const isMeasured = ({ name }) => results.pictures.some((picture) => Object.hasOwn(picture.figures, name));
  const measured = [...metrics.values()].filter(isMeasured).map(({ name, label }) => [name, label]);
  const figure = choice("Shown metric", [[null, "none"], ...measured], layout.figure, (name) => {
    layout.figure = name;
    showGrid();
  });
  const axisChoices = [
    choice("Rows", names, layout.rows, set("rows", "columns")),
    choice("Columns", names, layout.columns, set("columns", "rows")),
  ];
  at("layout").replaceChildren(
    ...(varyingAxes.length > 1 ? axisChoices : []),
    ...(measured.length > 0 ? [figure] : []),
    make("label", {}, "Size ", size),
  );
}

function setSize(pixels) {
  at("grid").style.setProperty("--size", `${pixels}px`);
}

/** The size at which all columns fit without scrolling, within limits. */
function fittingSize() {
  const columns = layout.columns === null ? 1 : usedValues(layout.columns).length;
  const perCell = shownPictures().length / columns / (layout.rows === null ? 1 : usedValues(layout.rows).length);
  const across = columns * Math.ceil(Math.sqrt(Math.max(1, perCell)));
  const room = at("grid").clientWidth * 0.86 - 24 * columns;
  return Math.min(256, Math.max(matchMedia("(max-width: 40rem)").matches ? 64 : 96, Math.floor(room / across / 8) * 8));
}

/** The values of an axis that pass the filters. */
function usedValues(name) {
  const wanted = filters.get(name);
  return axes.get(name).values.filter((value) => wanted.size === 0 || wanted.has(value));
}

function buildFilters() {
  at("filters").replaceChildren(...filterAxes.map((name) => {
    const chips = axes.get(name).values.map((value) => chip(name, value));
    return make("div", { className: "chips", role: "group", "aria-label": `Filter by ${name}` },
      make("span", { className: "note" }, name), make("div", {}, chips));
  }));
}

function chip(name, value) {
  const wanted = filters.get(name);
  const text = written(value);
  const button = make("button", { type: "button", className: "chip", dir: "auto", title: text }, text);
  button.setAttribute("aria-pressed", wanted.has(value));
  button.addEventListener("click", () => {
    if (!wanted.delete(value)) wanted.add(value);
    button.setAttribute("aria-pressed", wanted.has(value));
    showGrid();
  });
  return button;
}

function showGrid() {
  const shown = shownPictures();
  const total = results.pictures.length;
  at("count").textContent = shown.length === total ? `${total} images` : `${shown.length} of ${total} images`;
  const cells = new Map();
  const valueOn = (name, picture) => (name === null ? null : axes.get(name).of(picture));
  for (const index of shown) {
    const picture = results.pictures[index];
    const row = valueOn(layout.rows, picture);
    const column = valueOn(layout.columns, picture);
    if (!cells.has(row)) cells.set(row, new Map());
    if (!cells.get(row).has(column)) cells.get(row).set(column, []);
    cells.get(row).get(column).push(index);
  }
  const rows = layout.rows === null ? [null] : usedValues(layout.rows).filter((value) => cells.has(value));
  const columns = layout.columns === null ? [null] : usedValues(layout.columns);
  shownRows = rows.map((row) => columns.flatMap((column) => cells.get(row)?.get(column) ?? []));
  lazy.disconnect();
  at("grid").replaceChildren(gridTable(rows, columns, cells));
  at("grid").querySelectorAll(".picture").forEach((button, n) => {
    button.tabIndex = n === 0 ? 0 : -1;
    lazy.observe(button);
  });
}

function gridTable(rows, columns, cells) {
  const inside = filterAxes.filter((name) => name !== layout.rows && name !== layout.columns);
  const open = inside.filter((name) => usedValues(name).length > 1);
  const heading = (value, scope) =>
    make("th", { scope }, make("div", { dir: "auto", title: written(value) }, written(value)));
  const corner = layout.rows === null ? [] : [make("td", { className: "corner" })];
  const headings = columns.map((value) => heading(value, "col"));
  const head = layout.columns === null ? [] : [make("thead", {}, make("tr", {}, corner, headings))];
  const body = rows.map((row) => make("tr", {},
    layout.rows === null ? [] : heading(row, "row"),
    columns.map((column) => cell(cells.get(row)?.get(column) ?? [], open)),
  ));
  return make("table", {}, head, make("tbody", {}, body));
}

/** Several images of one cell form a square; the values in which they differ are below each. */
function cell(indices, open) {
  const group = make("div", { className: "cell" }, indices.map((index) => pictureButton(index, open)));
  const across = layout.columns === null ? "auto-fill" : Math.ceil(Math.sqrt(Math.max(1, indices.length)));
  group.style.setProperty("--across", across);
  return make("td", {}, group);
}

function pictureButton(index, open) {
  const picture = results.pictures[index];
  const { width, height } = picture.thumbnail;
  const words = [];
  if (open.length > 0) words.push(described(picture, open));
  if (layout.figure !== null && Object.hasOwn(picture.figures, layout.figure)) {
    words.push(fixed(picture.figures[layout.figure], figureDigits.get(layout.figure)));
  }
  const label = `${picture.subject}: ${described(picture, varyingAxes.filter((name) => name !== SUBJECT))}`;
  return make("button", { type: "button", className: "picture", "data-index": index, "aria-label": label },
    make("img", { alt: "", width, height }),
    words.length > 0 ? make("span", { className: "caption" }, words.join(" · ")) : null);
}

/** The image that an arrow key moves to, or the same at an edge. */
function neighbour(index, key) {
  const row = shownRows.findIndex((indices) => indices.includes(index));
  if (row < 0) return shownRows[0]?.[0] ?? index;
  const column = shownRows[row].indexOf(index);
  if (key === "ArrowLeft") return shownRows[row][column - 1] ?? shownRows[row - 1]?.at(-1) ?? index;
  if (key === "ArrowRight") return shownRows[row][column + 1] ?? shownRows[row + 1]?.[0] ?? index;
  const other = shownRows[row + (key === "ArrowUp" ? -1 : key === "ArrowDown" ? 1 : 0)];
  return other ? other[Math.min(column, other.length - 1)] : index;
}

function focusPicture(index) {
  const button = at("grid").querySelector(`.picture[data-index="${index}"]`);
  at("grid").querySelector('.picture[tabindex="0"]')?.setAttribute("tabindex", "-1");
  button?.setAttribute("tabindex", "0");
  button?.focus();
}

function listenToGrid() {
  const chosen = (event) => event.target.closest(".picture");
  at("grid").addEventListener("click", (event) => {
    if (chosen(event)) enlarge(Number(chosen(event).dataset.index));
  });
  at("grid").addEventListener("keydown", (event) => {
    if (!chosen(event) || !event.key.startsWith("Arrow")) return;
    event.preventDefault();
    focusPicture(neighbour(Number(chosen(event).dataset.index), event.key));
  });
  // Load all images before printing.
  addEventListener("beforeprint", () => at("grid").querySelectorAll(".picture").forEach(load));
}

/** Filters the images by these values and scrolls to them. */
function showOnly(wanted) {
  for (const [name, value] of wanted) {
    if (!filters.has(name)) continue;
    filters.get(name).clear();
    filters.get(name).add(value);
  }
  buildFilters();
  showGrid();
  at("pictures").scrollIntoView();
}
