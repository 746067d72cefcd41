// The blind vote: pairs of images, answers, and scores of the subjects.

const STORE = `sdft vote ${results.id}`;
const KEYS = {
  1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", 0: "tie", ArrowUp: "tie", ArrowDown: "skip",
};

/** Indices of the left and right image, and the choice: left, right, tie or skip. */
let votes = storedVotes();
/** Pairs that are still to be shown, the next one last. */
let waiting = [];

/** The votes in the browser's storage; some browsers have none for pages from disk. */
function storedVotes() {
  try {
    const stored = JSON.parse(localStorage.getItem(STORE) ?? "[]");
    return stored.filter(({ left, right }) => results.pictures[left] && results.pictures[right]);
  } catch {
    at("storage").hidden = false;
    return [];
  }
}

function storeVotes() {
  try {
    localStorage.setItem(STORE, JSON.stringify(votes));
  } catch {
    at("storage").hidden = false;
  }
}

function pairName(one, other) {
  return one < other ? `${one} ${other}` : `${other} ${one}`;
}

/** Pairs of shown images at one position, without those that were answered; order and sides are random. */
function pairsToAsk() {
  const answered = new Set(votes.map(({ left, right }) => pairName(left, right)));
  const shown = new Set(shownPictures());
  const pairs = [];
  for (const here of places.values()) {
    const indices = [...here.values()].filter((index) => shown.has(index));
    indices.forEach((one, n) => indices.slice(n + 1).forEach((other) => {
      if (!answered.has(pairName(one, other))) pairs.push(Math.random() < 0.5 ? [one, other] : [other, one]);
    }));
  }
  for (let n = pairs.length - 1; n > 0; n--) {
    const other = Math.floor(Math.random() * (n + 1));
    [pairs[n], pairs[other]] = [pairs[other], pairs[n]];
  }
  return pairs;
}

function startVoting() {
  waiting = pairsToAsk();
  at("ballot").showModal();
  ask();
}

function ask() {
  const pair = waiting.at(-1);
  const done = pair === undefined;
  const progress = `${votes.length} answered, ${waiting.length} to go`;
  at("ballot-count").textContent = done ? "All pairs are answered." : progress;
  at("undo").disabled = votes.length === 0;
  for (const button of at("ballot").querySelectorAll("[data-choice]")) button.disabled = done;
  // The buttons are disabled, and keys only reach a focused element.
  if (done) at("ballot-close").focus();
  for (const [id, side] of [["ballot-left", 0], ["ballot-right", 1]]) {
    at(id).hidden = done;
    if (!done) showLarge(at(id), pair[side]);
  }
  const picture = done ? null : results.pictures[pair[0]];
  at("ballot-question").textContent = done ? "" : written(picture.axes[PROMPT] ?? "");
  // Values that identify subjects, such as the rank of a sweep, are not shown: the vote is blind.
  at("ballot-settings").textContent = done ? "" : described(picture, varyingAxes.filter((name) =>
    name !== PROMPT && Object.hasOwn(results.axes, name)));
}

function answer(choice) {
  if (waiting.length === 0) return;
  const [left, right] = waiting.pop();
  votes.push({ left, right, choice });
  storeVotes();
  ask();
}

function undo() {
  if (votes.length === 0) return;
  const { left, right } = votes.pop();
  waiting.push([left, right]);
  storeVotes();
  ask();
}

/** Scores of the subjects that were voted on, the best first. */
function scores() {
  const voted = new Set(counted().flatMap(({ left, right }) => [subjectOf(left), subjectOf(right)]));
  const names = [...subjects.keys()].filter((name) => voted.has(name));
  const wins = names.map(() => names.map(() => 0));
  for (const { left, right, choice } of counted()) {
    const [i, j] = [names.indexOf(subjectOf(left)), names.indexOf(subjectOf(right))];
    wins[i][j] += { left: 1, right: 0, tie: 0.5 }[choice];
    wins[j][i] += { left: 0, right: 1, tie: 0.5 }[choice];
  }
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const rated = bradleyTerry(wins).map((score, i) => {
    const [won, lost] = [sum(wins[i]), sum(wins.map((row) => row[i]))];
    return { subject: names[i], ...score, won, votes: won + lost };
  });
  return rated.sort((a, b) => b.score - a.score);
}

const subjectOf = (index) => results.pictures[index].subject;
const counted = () => votes.filter(({ choice }) => choice !== "skip");

function showScores() {
  at("export").disabled = at("forget").disabled = votes.length === 0;
  at("start").textContent = votes.length === 0 ? "Start voting" : "Continue voting";
  const rated = counted().length > 0 ? scores() : [];
  if (rated.length === 0) return at("scores").replaceChildren();
  const ends = rated.flatMap(({ low, high }) => [low, high]);
  const percent = (score) => `${Math.round(100 * logistic(score))} %`;
  const rows = rated.map(({ subject, score, low, high, won, votes }) => {
    const chance = make("div", {}, make("b", {}, percent(score)),
      whisker({ value: score, low, high }, Math.min(...ends), Math.max(...ends)),
      make("small", {}, `${percent(low)} to ${percent(high)}`));
    return [subject, chance, `${written(won)} of ${votes}`];
  });
  const note = "Probability to be preferred to an average subject (Bradley-Terry), with its 95 % interval; "
    + "no preference counts as half a vote for each.";
  return at("scores").replaceChildren(plainTable(["subject", "probability", "votes won"], rows),
    make("p", { className: "note" }, note));
}

function exported() {
  const side = (index) => ({ subject: subjectOf(index), path: results.pictures[index].path });
  return {
    comparison: results.title,
    id: results.id,
    exported: new Date().toISOString(),
    votes: votes.map(({ left, right, choice }) =>
      ({ axes: results.pictures[left].axes, left: side(left), right: side(right), choice })),
    scores: counted().length > 0 ? scores() : [],
  };
}

function exportVotes() {
  const url = URL.createObjectURL(new Blob([JSON.stringify(exported(), null, 2)], { type: "application/json" }));
  make("a", { href: url, download: "votes.json" }).click();
  URL.revokeObjectURL(url);
}

function forgetVotes() {
  if (!confirm("Delete all votes of this page?")) return;
  votes = [];
  storeVotes();
  showScores();
}

function buildVote() {
  if (![...places.values()].some((here) => here.size > 1)) return;
  at("vote").hidden = false;
  const button = (id, text, act) => {
    const made = make("button", { type: "button", id }, text);
    made.addEventListener("click", act);
    return made;
  };
  at("vote-buttons").replaceChildren(
    button("start", "Start voting", startVoting),
    button("export", "Export as JSON", exportVotes),
    button("forget", "Delete the votes", forgetVotes),
  );
  at("undo").addEventListener("click", undo);
  at("ballot-close").addEventListener("click", () => at("ballot").close());
  at("ballot").addEventListener("close", showScores);
  at("ballot").addEventListener("click", (event) => {
    const chosen = event.target.closest("[data-choice]");
    if (chosen) answer(chosen.dataset.choice);
  });
  at("ballot").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (event.key === "Backspace") undo();
    else if (Object.hasOwn(KEYS, event.key)) answer(KEYS[event.key]);
    else return;
    event.preventDefault();
  });
  showScores();
}
