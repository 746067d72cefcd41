// The results as data: axes, filters, positions of images. Makes no elements, but sets the images of given ones.

const results = JSON.parse(at("results").textContent);
const SUBJECT = "subject";
const PROMPT = "prompt";

// Maps, because a subject or a metric may be called "constructor".
const subjects = new Map(results.subjects.map((subject) => [subject.name, subject]));
const metrics = new Map(results.metrics.map((metric) => [metric.name, metric]));
const figures = new Map(Object.entries(results.figures).map(([name, row]) => [name, new Map(Object.entries(row))]));

/** metric -> number of decimals for the values of single images. */
const figureDigits = new Map([...metrics.keys()].map((name) =>
  [name, decimals(results.pictures.map((picture) => picture.figures[name]))]));

/** Axis name -> its values in order, and the value of an image: subject, grid axes, varied values of subjects. */
const axes = new Map();
addAxis(SUBJECT, [...subjects.keys()], (picture) => picture.subject);
for (const [name, values] of Object.entries(results.axes)) {
  addAxis(name, values, (picture) => (Object.hasOwn(picture.axes, name) ? picture.axes[name] : NONE));
}
for (const name of new Set(results.subjects.flatMap((subject) => Object.keys(subject.varied)))) {
  const varied = (subject) => (Object.hasOwn(subject.varied, name) ? subject.varied[name] : NONE);
  const values = [...new Set(results.subjects.map(varied))];
  if (values.every(Number.isFinite)) values.sort((a, b) => a - b);
  // A sweep may vary the seed of training, which is not the seed of the images.
  addAxis(axes.has(name) ? `subject's ${name}` : name, values, (picture) => varied(subjects.get(picture.subject)));
}

function addAxis(name, values, of) {
  const stray = results.pictures.some((picture) => of(picture) === NONE) && !values.includes(NONE);
  axes.set(name, { values: stray ? [...values, NONE] : values, of });
}

/** Names of the axes with more than one value. */
const varyingAxes = [...axes.keys()].filter((name) => axes.get(name).values.length > 1);

/** The same without the subject if varied values (rank, rate) identify it: its name only repeats them. */
const filterAxes = varyingAxes.filter((name) => name !== SUBJECT || !variedIdentifiesSubjects());

function variedIdentifiesSubjects() {
  const combinations = new Set(results.subjects.map(({ varied }) => JSON.stringify(Object.entries(varied).sort())));
  const isVaried = results.subjects.some(({ varied }) => Object.keys(varied).length > 0);
  return combinations.size === results.subjects.length && isVaried;
}

/** Axis name -> the values that are shown; an empty set shows all. */
const filters = new Map(varyingAxes.map((name) => [name, new Set()]));

function isShown(picture) {
  for (const [name, wanted] of filters) {
    if (wanted.size > 0 && !wanted.has(axes.get(name).of(picture))) return false;
  }
  return true;
}

/** Indices of the images that pass the filters. */
function shownPictures() {
  return [...results.pictures.keys()].filter((index) => isShown(results.pictures[index]));
}

/** The position of an image in the grid, the same for all subjects. */
function placeOf(picture) {
  return JSON.stringify(Object.keys(results.axes).map((name) => axes.get(name).of(picture)));
}

/** position -> subject -> index of the image. */
const places = new Map();
for (const [index, picture] of results.pictures.entries()) {
  const place = placeOf(picture);
  if (!places.has(place)) places.set(place, new Map());
  places.get(place).set(picture.subject, index);
}

/** "seed 3, cfg 7": the values of an image on these axes. */
function described(picture, names) {
  return names.map((name) => `${name} ${written(axes.get(name).of(picture))}`).join(", ");
}

/** The path of an image as a link: `#`, `?` and `%` are escaped, and it cannot begin with a scheme. */
function linkTo(picture) {
  return `./${picture.path.split("/").map(encodeURIComponent).join("/")}`;
}

/** Shows the thumbnail. */
function showThumbnail(image, index) {
  const { uri, width, height, whole } = results.pictures[index].thumbnail;
  image.src = uri;
  image.width = width;
  image.height = height;
  image.classList.toggle("hard", whole);
}

/** Shows the thumbnail at once, and the file when it is loaded, if it is larger. */
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
