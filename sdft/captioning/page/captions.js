// Captions to read, correct and export. What is written stays in the browser's storage until it is exported.

const data = JSON.parse(at("data").textContent);
const STORE = `sdft captions ${data.id}`;
const AT_ONCE = 120;
const KINDS = [
  ["all", "All images", () => true],
  ["changed", "Changed here", (item) => isChanged(item)],
  ["empty", "Without caption", (item) => !textOf(item).trim()],
  ["made", "Made by a model", (item) => item.by !== null],
  ["written", "Written by a person", (item) => item.by === null && item.text !== ""],
  ["same", "Same caption as another", (item) => counts.get(textOf(item)) > 1],
];

/** Key -> text that was written here. */
let drafts = storedDrafts();
let kind = "all";
let limit = AT_ONCE;
let counts = new Map();

function storedDrafts() {
  try {
    const known = new Set(data.items.map(({ key }) => key));
    const stored = Object.entries(JSON.parse(localStorage.getItem(STORE) ?? "{}"));
    return new Map(stored.filter(([key, text]) => known.has(key) && typeof text === "string"));
  } catch {
    at("storage").hidden = false;
    return new Map();
  }
}

function storeDrafts() {
  try {
    localStorage.setItem(STORE, JSON.stringify(Object.fromEntries(drafts)));
  } catch {
    at("storage").hidden = false;
  }
}

function textOf(item) {
  return drafts.get(item.key) ?? item.text;
}

function isChanged(item) {
  return drafts.has(item.key);
}

function setText(item, text) {
  if (text.trim().split(/\s+/u).join(" ") === item.text) drafts.delete(item.key);
  else drafts.set(item.key, text);
  storeDrafts();
}

/** The images that pass the search and the chosen kind. */
function shownItems() {
  const words = at("find").value.toLowerCase();
  const [, , passes] = KINDS.find(([name]) => name === kind);
  counts = new Map();
  for (const item of data.items) counts.set(textOf(item), (counts.get(textOf(item)) ?? 0) + 1);
  return data.items.filter((item) => passes(item)
    && (textOf(item).toLowerCase().includes(words) || item.key.toLowerCase().includes(words)));
}

function card(item) {
  const area = make("textarea", { value: textOf(item), dir: "auto", spellcheck: true, ariaLabel: `Caption of ${item.key}` });
  const undo = make("button", { type: "button", className: "quiet" }, "Undo");
  const state = make("span", {});
  const { uri, width, height } = item.picture;
  const picture = make("img", { src: uri, alt: "", loading: "lazy", className: Math.max(width, height) <= 128 ? "small" : "" });
  const element = make("article", { className: "card" },
    make("div", { className: "frame" }, picture),
    make("div", { className: "name", dir: "auto", title: item.key }, item.key),
    area,
    make("div", { className: "foot" }, state, undo));
  const update = () => {
    element.classList.toggle("changed", isChanged(item));
    undo.hidden = !isChanged(item);
    state.textContent = isChanged(item) ? "changed" : item.by !== null ? `made by ${item.by}` : item.text ? "" : "no caption";
    showCount();
  };
  area.addEventListener("input", () => { setText(item, area.value); update(); });
  undo.addEventListener("click", () => { setText(item, item.text); area.value = item.text; update(); area.focus(); });
  update();
  return element;
}

function show() {
  const items = shownItems();
  at("cards").replaceChildren(...items.slice(0, limit).map(card));
  at("more").hidden = items.length <= limit;
  at("more").textContent = `Show more (${items.length - limit} left)`;
  showCount(items.length);
}

let lastShown = 0;
function showCount(shown = lastShown) {
  lastShown = shown;
  at("count").textContent = `${shown} of ${data.items.length} images shown, ${drafts.size} changed`;
  at("export").disabled = drafts.size === 0;
}

function replaceInShown() {
  const old = at("old").value;
  if (!old) return;
  for (const item of shownItems()) {
    const text = textOf(item);
    if (text.includes(old)) setText(item, text.replaceAll(old, () => at("new").value));
  }
  show();
}

function exportCorrections() {
  const empty = data.items.filter((item) => isChanged(item) && !textOf(item).trim());
  if (empty.length > 0) {
    at("count").textContent = `${empty.length} captions are empty, such as that of ${empty[0].key}: write them, or undo.`;
    return;
  }
  const rows = data.items.filter(isChanged).map((item) => [item.key, { before: item.text, text: textOf(item) }]);
  const content = { kind: "sdft captions", captions: Object.fromEntries(rows) };
  const file = new Blob([`${JSON.stringify(content, null, 1)}\n`], { type: "application/json" });
  const link = make("a", { href: URL.createObjectURL(file), download: "corrections.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function showTags() {
  const found = new Map();
  for (const item of data.items) {
    const tags = new Set(item.text.split(",").map((tag) => tag.trim()).filter(Boolean));
    if (tags.size > 1) for (const tag of tags) found.set(tag, (found.get(tag) ?? 0) + 1);
  }
  const sorted = [...found].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1)).slice(0, 200);
  at("tags").hidden = sorted.length === 0;
  at("tag-list").replaceChildren(...sorted.map(([tag, number]) => {
    const button = make("button", { type: "button", dir: "auto" }, `${tag} ${number}`);
    button.addEventListener("click", () => { at("find").value = tag; limit = AT_ONCE; show(); scrollTo(0, 0); });
    return button;
  }));
}

startTheme();
at("folder").textContent = data.folder;
at("kinds").append(choice("Show", KINDS, kind, (name) => { kind = name; limit = AT_ONCE; show(); }));
at("find").addEventListener("input", () => { limit = AT_ONCE; show(); });
at("replace").addEventListener("click", replaceInShown);
at("export").addEventListener("click", exportCorrections);
at("more").addEventListener("click", () => { limit += AT_ONCE; show(); });
show();
showTags();
