// Flagged images by the reason; a click leaves one out. The choice is exported as exclude.txt.

const data = JSON.parse(at("data").textContent);
const STORE = `sdft exclude ${data.id}`;
const ALL = "All reasons";
let excluded = storedChoice() ?? new Set(data.items.filter(({ proposed }) => proposed).map(({ key }) => key));
let kind = ALL;

function storedChoice() {
  try {
    const stored = JSON.parse(localStorage.getItem(STORE));
    return Array.isArray(stored) ? new Set(stored.filter((key) => data.items.some((item) => item.key === key))) : null;
  } catch {
    return null;
  }
}

function toggle(key) {
  if (!excluded.delete(key)) excluded.add(key);
  try {
    localStorage.setItem(STORE, JSON.stringify([...excluded]));
  } catch {
    // Without storage, the choice lasts until the page is closed.
  }
  show();
}

function card(item) {
  const out = excluded.has(item.key);
  const element = make("button", { type: "button", className: "item", ariaPressed: String(out) },
    make("span", { className: "frame" }, make("img", { src: item.picture.uri, alt: "", loading: "lazy" })),
    make("span", { className: "name", dir: "auto", title: item.key }, item.key),
    make("span", { className: "why" }, item.flags.join("; ") || `${item.picture.width} x ${item.picture.height}`),
    make("span", { className: "state" }, out ? "left out" : "kept"));
  element.addEventListener("click", () => toggle(item.key));
  return element;
}

function show() {
  const focused = document.activeElement?.querySelector?.(".name")?.title;
  const groups = data.groups.filter(({ title }) => kind === ALL || title === kind);
  const byKey = new Map(data.items.map((item) => [item.key, item]));
  at("groups").replaceChildren(...groups.map(({ title, keys }) => make("section", { className: "group" },
    make("h2", { dir: "auto" }, `${title} (${keys.length})`),
    make("div", { className: "row" }, keys.map((key) => card(byKey.get(key)))))));
  const hidden = data.hidden > 0 ? `, ${data.hidden} more are flagged and not shown here` : "";
  at("count").textContent = `${data.items.length} of ${data.total} images are flagged, ${excluded.size} are left out${hidden}`;
  if (focused) [...document.querySelectorAll(".item")].find((element) => element.querySelector(".name").title === focused)?.focus();
}

function exportChoice() {
  const lines = ["# Images to leave out: data.exclude=exclude.txt", ...data.items.map(({ key }) => key).filter((key) => excluded.has(key))];
  const link = make("a", { href: URL.createObjectURL(new Blob([`${lines.join("\n")}\n`], { type: "text/plain" })), download: "exclude.txt" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

startTheme();
at("folder").textContent = data.folder;
const titles = [ALL, ...new Set(data.groups.map(({ title }) => title))];
at("kinds").append(choice("Show", titles.map((title) => [title, title]), kind, (title) => { kind = title; show(); }));
at("export").addEventListener("click", exportChoice);
show();
