// Builds the page: title, recommendation, sections. Runs last.

function showLead() {
  document.title = results.title;
  at("title").textContent = results.title;
  const { recommended, reason } = results.tradeoff ?? {};
  const say = (...words) => at("lead").append(make("p", { className: "verdict" }, ...words));
  if (recommended) {
    say("Keep ", make("b", { dir: "auto" }, recommended), ".");
    at("lead").append(make("p", { dir: "auto" }, reason));
  } else if (results.verdicts.length > 0) {
    const found = results.verdicts.filter((verdict) => judged(verdict).kind !== "same").length;
    say(`${found} of ${results.verdicts.length} differences are statistically significant.`);
  } else {
    const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
    say(`${count(results.pictures.length, "image")} of ${count(subjects.size, "subject")}.`);
  }
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
