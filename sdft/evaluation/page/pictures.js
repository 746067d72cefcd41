// The results as data: axes, filters, which picture stands where. Makes no elements, except to load what they show.

const results = JSON.parse(at("results").textContent);
const SUBJECT = "subject";
const PROMPT = "prompt";

// Maps, because a subject or a metric may be called "constructor".
const subjects = new Map(results.subjects.map((subject) => [subject.name, subject]));
const metrics = new Map(results.metrics.map((metric) => [metric.name, metric]));
const figures = new Map(Object.entries(results.figures).map(([name, row]) => [name, new Map(Object.entries(row))]));

/** metric -> how many decimals the figures of single pictures are written with. */
const figureDigits = new Map([...metrics.keys()].map((name) =>
  [name, decimals(results.pictures.map((picture) => picture.figures[name]))]));

/** Axis name -> its values in order and the value of a picture: the subject, what tells subjects apart, the rest. */
const axes = new Map();
addAxis(SUBJECT, [...subjects.keys()], (picture) => picture.subject);
for (const [name, values] of Object.entries(results.axes)) {
  addAxis(name, values, (picture) => (Object.hasOwn(picture.axes, name) ? picture.axes[name] : NONE));
}
for (const name of new Set(results.subjects.flatMap((subject) => Object.keys(subject.varied)))) {
  const varied = (subject) => (Object.hasOwn(subject.varied, name) ? subject.varied[name] : NONE);
  const values = [...new Set(results.subjects.map(varied))];
  if (values.every(Number.isFinite)) values.sort((a, b) => a - b);
  // A sweep may vary the seed of training, while the pictures have seeds of their own.
  addAxis(axes.has(name) ? `subject's ${name}` : name, values, (picture) => varied(subjects.get(picture.subject)));
}

function addAxis(name, values, of) {
  const stray = results.pictures.some((picture) => of(picture) === NONE) && !values.includes(NONE);
  axes.set(name, { values: stray ? [...values, NONE] : values, of });
}

/** Names of the axes along which something differs. */
const varyingAxes = [...axes.keys()].filter((name) => axes.get(name).values.length > 1);

/** The same without the subject where rank, rate and the like tell each from all others: its name only repeats them. */
const tellingAxes = varyingAxes.filter((name) => name !== SUBJECT || !variedTellsSubjects());

function variedTellsSubjects() {
  const told = new Set(results.subjects.map(({ varied }) => JSON.stringify(Object.entries(varied).sort())));
  return told.size === results.subjects.length && results.subjects.some(({ varied }) => Object.keys(varied).length > 0);
}

/** Axis name -> the values that are shown; an empty set shows all. */
const filters = new Map(varyingAxes.map((name) => [name, new Set()]));

function isShown(picture) {
  for (const [name, wanted] of filters) {
    if (wanted.size > 0 && !wanted.has(axes.get(name).of(picture))) return false;
  }
  return true;
}

/** Numbers of the pictures that pass the filters. */
function shownPictures() {
  return [...results.pictures.keys()].filter((index) => isShown(results.pictures[index]));
}

/** Where a picture stands, whoever drew it: the same for all subjects. */
function placeOf(picture) {
  return JSON.stringify(Object.keys(results.axes).map((name) => axes.get(name).of(picture)));
}

/** place -> subject -> number of the picture. */
const places = new Map();
for (const [index, picture] of results.pictures.entries()) {
  const place = placeOf(picture);
  if (!places.has(place)) places.set(place, new Map());
  places.get(place).set(picture.subject, index);
}

/** "seed 3, cfg 7": a picture's values on these axes. */
function described(picture, names) {
  return names.map((name) => `${name} ${written(axes.get(name).of(picture))}`).join(", ");
}

/** A picture's path as a link: a name with `#`, `?` or `%` in it stays a name, and no scheme can stand before it. */
function linkTo(picture) {
  return `./${picture.path.split("/").map(encodeURIComponent).join("/")}`;
}

/** Shows the embedded picture. */
function showThumbnail(image, index) {
  const { uri, width, height, whole } = results.pictures[index].thumbnail;
  image.src = uri;
  image.width = width;
  image.height = height;
  image.classList.toggle("hard", whole);
}

/** Shows the embedded picture at once, and the file as soon as it is there, where that has more to show. */
function showLarge(image, index) {
  const picture = results.pictures[index];
  showThumbnail(image, index);
  image.dataset.index = index;
  if (picture.thumbnail.whole) return;
  const file = new Image();
  file.addEventListener("load", () => {
    if (image.dataset.index === String(index)) image.src = file.src;
  });
  file.src = linkTo(picture);
}
