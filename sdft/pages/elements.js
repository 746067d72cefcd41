"use strict";
// Functions that make elements and format numbers. Texts of users become text or attributes, never markup.

/** make("p", {className: "note"}, "text", child, [more children]); null children are left out. */
function make(tag, properties = {}, ...children) {
  return filled(document.createElement(tag), properties, children);
}

/** The same for SVG, where everything is an attribute. */
function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.flat());
  return element;
}

function filled(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat(2).filter((child) => child !== null));
  return element;
}

function at(id) {
  return document.getElementById(id);
}

/** A labelled select element; options: [value, label] pairs, with values of any type. */
function choice(label, options, chosen, change) {
  const select = make("select", {}, options.map(([, text]) => make("option", {}, text)));
  select.selectedIndex = Math.max(0, options.findIndex(([value]) => value === chosen));
  select.addEventListener("change", () => change(options[select.selectedIndex][0]));
  return make("label", {}, `${label} `, select);
}

/** Terms with their descriptions; entries: [term, description] pairs. */
function terms(entries) {
  return entries.flatMap(([term, text]) => [make("dt", {}, term), make("dd", { dir: "auto" }, text)]);
}

const NONE = "–";

/** The number of decimals that gives the largest of these numbers three significant digits. */
function decimals(numbers) {
  const largest = Math.max(...numbers.filter(Number.isFinite).map(Math.abs), 0);
  return largest === 0 ? 0 : Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(largest))));
}

/** A number with this many decimals and a typographic minus sign. */
function fixed(number, digits) {
  if (!Number.isFinite(number)) return NONE;
  const text = number.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
}

/** A value of an axis or a setting, as text. */
function written(value) {
  if (value === null || value === undefined) return NONE;
  if (value === "") return "(empty)";
  return typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(6))) : String(value);
}

/** A cost, in the unit that its name ends with: seconds, bytes, or a count. */
function cost(name, amount) {
  if (!Number.isFinite(amount)) return NONE;
  if (name.endsWith("seconds")) return duration(amount);
  const units = name.endsWith("bytes") ? [" B", " kB", " MB", " GB", " TB"] : ["", " k", " M", " G", " T"];
  const step = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(Math.max(amount, 1)) / 3)));
  return Number((amount / 1000 ** step).toPrecision(3)) + units[step];
}

function duration(seconds) {
  if (seconds < 60) return `${Number(seconds.toPrecision(2))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function hasInterval({ low, high }) {
  return Number.isFinite(low) && Number.isFinite(high);
}

/** "0.28 to 0.32", or "" if there is only one number. */
function interval(estimate, digits) {
  return hasInterval(estimate) ? `${fixed(estimate.low, digits)} to ${fixed(estimate.high, digits)}` : "";
}
