// Tables that pages share.

/**
 * A table with a row for each of `items`; a click on a heading sorts by it, the next one reverses the order.
 * columns: [{label, hint, title, value, cell}]; first, name: heading of the first column, and its cell for an item.
 */
function sortableTable(columns, items, first, name) {
  const body = make("tbody");
  const headings = columns.map((column) => {
    const button = make("button", { type: "button", className: "sort", title: column.title ?? "" }, column.label);
    const heading = make("th", { scope: "col" }, button, make("small", {}, column.hint));
    button.addEventListener("click", () => {
      const order = heading.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", order);
      fill([...items].sort(byValue(column.value, order)));
    });
    return heading;
  });
  const row = (item) => make("tr", {}, make("th", { scope: "row", dir: "auto" }, name(item)),
    columns.map(({ cell }) => make("td", {}, cell(item))));
  const rows = new Map(items.map((item) => [item, row(item)]));
  const fill = (ordered) => body.replaceChildren(...ordered.map((item) => rows.get(item)));
  fill(items);
  return make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, first), headings)), body);
}

/** Missing values come last in both orders. */
function byValue(value, order) {
  const sign = order === "descending" ? -1 : 1;
  return (one, other) => {
    const [a, b] = [value(one), value(other)];
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  };
}

/** Rows of text; the first of each row is its heading. */
function plainTable(heads, rows) {
  const line = ([first, ...rest]) => make("tr", {}, make("th", { scope: "row", dir: "auto" }, written(first)),
    rest.map((item) => make("td", { dir: "auto" }, item instanceof Node ? item : written(item))));
  return make("table", {}, make("thead", {}, make("tr", {}, heads.map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, rows.map(line)));
}
