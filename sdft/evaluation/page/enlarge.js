// The enlarged image: its settings, its neighbours, and the same image of another subject behind a slider.

let enlarged = null;
/** The subject that is compared with; it stays the same when the reader moves to other images. */
let behind = null;

function enlarge(index) {
  enlarged = index;
  const picture = results.pictures[index];
  showLarge(at("over"), index);
  at("over").alt = `${picture.subject}: ${described(picture, Object.keys(results.axes))}`;
  at("large-subject").textContent = picture.subject;
  at("large-prompt").textContent = Object.hasOwn(picture.axes, PROMPT) ? picture.axes[PROMPT] : "";
  const { width, height } = picture.thumbnail;
  at("stage").style.setProperty("--ratio", width / height);
  const measured = Object.entries(picture.figures).map(([name, value]) =>
    [metrics.get(name)?.label ?? name, fixed(value, figureDigits.get(name))]);
  const settings = Object.entries(picture.settings).map(([name, value]) => [name, written(value)]);
  at("large-settings").replaceChildren(...terms([...measured, ...settings, ["pixels", `${width} × ${height}`]]));
  at("file").href = linkTo(picture);
  at("copy").textContent = "Copy settings";
  const order = shownRows.flat();
  at("place").textContent = order.includes(index) ? `${order.indexOf(index) + 1} of ${order.length}` : "";
  offerOthers(picture);
  showBehind(picture);
  if (!at("large").open) at("large").showModal();
}

function offerOthers(picture) {
  const others = [...places.get(placeOf(picture)).keys()].filter((name) => name !== picture.subject);
  at("compare").hidden = others.length === 0;
  at("other").replaceChildren(...["nothing", ...others].map((name) => make("option", { value: name }, name)));
  at("other").selectedIndex = others.indexOf(behind) + 1;
}

function showBehind(picture) {
  const index = behind === picture.subject ? undefined : places.get(placeOf(picture)).get(behind);
  const compared = index !== undefined;
  for (const id of ["under", "split", "tag-left", "tag-right"]) at(id).hidden = !compared;
  at("stage").classList.toggle("compared", compared);
  if (!compared) return;
  showLarge(at("under"), index);
  at("under").alt = `compared with: ${behind}`;
  at("tag-left").textContent = picture.subject;
  at("tag-right").textContent = behind;
  moveSplit(Number(at("split").value));
}

/** Left of `percent` is the image, right of it the one it is compared with. */
function moveSplit(percent) {
  at("split").value = percent;
  at("stage").style.setProperty("--split", `${percent}%`);
}

function followPointer(event) {
  const { left, width } = at("stage").getBoundingClientRect();
  moveSplit(Math.min(100, Math.max(0, (100 * (event.clientX - left)) / width)));
}

function settingsText(picture) {
  return JSON.stringify({ subject: picture.subject, ...picture.settings }, null, 2);
}

async function copySettings() {
  const text = settingsText(results.pictures[enlarged]);
  try {
    await navigator.clipboard.writeText(text);
    at("copy").textContent = "Copied";
  } catch {
    // Without access to the clipboard, the settings beside the image are selected.
    getSelection().selectAllChildren(at("large-settings"));
    at("copy").textContent = "Selected: copy with the keyboard";
  }
}

function listenToEnlarged() {
  const dialog = at("large");
  const move = (key) => enlarge(neighbour(enlarged, key));
  at("previous").addEventListener("click", () => move("ArrowLeft"));
  at("next").addEventListener("click", () => move("ArrowRight"));
  at("close").addEventListener("click", () => dialog.close());
  at("copy").addEventListener("click", copySettings);
  at("split").addEventListener("input", () => moveSplit(Number(at("split").value)));
  at("other").addEventListener("change", () => {
    behind = at("other").selectedIndex === 0 ? null : at("other").value;
    showBehind(results.pictures[enlarged]);
  });
  for (const kind of ["pointermove", "pointerdown"]) at("stage").addEventListener(kind, followPointer);
  dialog.addEventListener("keydown", (event) => {
    if (!event.key.startsWith("Arrow") || event.target.matches("select, input")) return;
    event.preventDefault();
    move(event.key);
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  dialog.addEventListener("close", () => focusPicture(enlarged));
}
