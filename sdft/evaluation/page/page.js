// Builds the page: title, recommendation, sections. Runs last.

function showLead() {
  document.title = results.title;
  at("title").textContent = results.title;
  const { sentence, detail } = results.headline ?? {};
  const say = (text, className = "") => at("lead").append(make("p", { className, dir: "auto" }, text));
  say(sentence ?? `${results.pictures.length} images, ${subjects.size} subjects.`, "verdict");
  if (detail) say(detail);
}

function listContents() {
  const shown = [...document.querySelectorAll("main > section:not([hidden])")];
  at("contents").replaceChildren(...shown.map((section) =>
    make("a", { href: `#${section.id}` }, section.querySelector("h2").textContent)));
}

startTheme();
showLead();
buildGridControls();
buildFilters();
showGrid();
listenToGrid();
listenToEnlarged();
showFigures();
showVerdicts();
showTradeoff();
showHeatMaps();
buildVote();
showAbout();
listContents();
