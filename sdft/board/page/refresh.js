// A page of a run that goes on loads itself again, and keeps what the reader has set.

const GOING = ["training", "finishing"];
const SLOWLY = 60;

function isGoing() {
  return GOING.includes(run.state.what);
}

/** Seconds since the run was last heard of. */
function silence() {
  return Math.max(0, Date.now() / 1000 - run.state.updated);
}

function isSilent() {
  return isGoing() && silence() > run.state.patience;
}

function remembered() {
  try {
    return JSON.parse(sessionStorage.getItem(`sdft run ${run.id}`)) ?? {};
  } catch {
    return {};
  }
}

function remember() {
  const opened = [...document.querySelectorAll("details[open]")].map(({ id }) => id);
  const kept = { scroll: scrollY, smoothing, step: shownStep, opened };
  try {
    sessionStorage.setItem(`sdft run ${run.id}`, JSON.stringify(kept));
  } catch {
    // Without storage, a reload begins at the top.
  }
}

/** Sets what was set before the page loaded itself again; called when everything is shown. */
function restore({ scroll = 0, step = null, opened = [] }) {
  for (const id of opened) if (at(id)) at(id).open = true;
  const place = run.previews?.steps.findIndex((one) => one.step === step) ?? -1;
  if (step !== null && place >= 0) {
    at("step").value = place;
    at("step").dispatchEvent(new Event("input"));
  }
  history.scrollRestoration = "manual";
  if (!location.hash || scroll) scrollTo({ top: scroll, behavior: "instant" });
}

let held = false;

function isBusy() {
  const typing = document.activeElement?.matches("input[type='search'], select");
  return held || document.hidden || Boolean(typing) || String(getSelection()).length > 0;
}

function keepFresh() {
  addEventListener("pagehide", remember);
  addEventListener("pointerdown", () => { held = true; });
  for (const kind of ["pointerup", "pointercancel"]) addEventListener(kind, () => { held = false; });
  if (!isGoing()) return;
  const opened = Date.now();
  setInterval(() => {
    showNews();
    const wait = isSilent() ? Math.max(SLOWLY, run.every) : run.every;
    if ((Date.now() - opened) / 1000 < wait || isBusy()) return;
    remember();
    location.reload();
  }, 1000);
}
